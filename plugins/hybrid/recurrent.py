"""The recurrent form of the inner loop: one token of every stream, in place. What streaming runs.

See ``inner_loop`` for what is computed.

Shape legend: B streams, H heads, C tokens a chunk, D head width. Everything has the dtype of the fast weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, UpdateRule, chunk_gradients, descend_, query_pass
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, only_finite, unpack
from moshi_ttt.plugins.hybrid.objective import Objective


@torch.no_grad()
def recurrent_inner_loop(
    tokens: Tokens,
    state: BlockState,
    norm: Objective,
    token_scale: Tensor,
    exec_mask: Tensor | None = None,
    rule: UpdateRule | None = None,
    updated: Tensor | None = None,
) -> Tensor:
    """One token of every stream, causal, without a device synchronization.

    Args:
        tokens: with T = 1.
        state: buffers, updated in place; rows where ``exec_mask`` is false stay bit-equal.
        norm: as in ``chunk_inner_loop``.
        token_scale: ``[C]``.
        exec_mask: ``[B]`` bool; None: all rows.
        rule, updated: as in ``chunk_inner_loop``.

    Returns:
        ``y [B, 1, H * D]``.
    """
    position = state["position"]
    fast, memory = unpack(state)
    tokens, finite = only_finite(tokens)
    lr = tokens.lr[..., None]  # [B, 1, H] -> [B, 1, H, 1]
    q, k, v, lr = (part.transpose(1, 2) for part in tokens._replace(lr=lr))  # [B, 1, H, any] -> [B, H, 1, any]
    size = memory.inputs[0].shape[2]
    token, bounded = chunk_gradients(k, v, lr, fast, norm, token_scale)
    finite = finite if bounded is None else finite & bounded  # [B, 1]
    buffers = memory.inputs + memory.gradients + memory.tokens
    entries = token.inputs + token.gradients + ((v, lr) if memory.tokens else ())
    for buffer, entry in zip(buffers, entries, strict=True):
        # [B] -> [B, H, 1, any]: the token's slot, for a buffer [B, H, C, any] and an entry [B, H, 1, any]
        slot = position.view(-1, 1, 1, 1).expand(-1, buffer.shape[1], 1, buffer.shape[3])
        if exec_mask is not None:
            # [B, 1, 1, 1] over [B, H, 1, any]
            entry = torch.where(row_mask(exec_mask, entry), entry, buffer.gather(2, slot))
        buffer.scatter_(2, slot, entry)  # [B, H, 1, any] into [B, H, C, any]
    seen = (torch.arange(size, device=position.device) <= position[:, None])[:, None]  # [C] and [B, 1] -> [B, 1, C]
    # Slots ahead of the position hold nothing; whatever lies there (even nan) is replaced, not multiplied by zero.
    gradients = tuple(torch.where(seen[..., None], g, 0) for g in memory.gradients)  # [B, 1, C, 1] over [B, H, C, out]
    seen_keys = ChunkMemory(memory.inputs, gradients, memory.tokens)
    rule = rule or UpdateRule()
    scale = token_scale[position].view(-1, 1, 1, 1)  # [B] -> [B, 1, 1, 1]
    y = query_pass(q, fast, seen_keys, norm, scale, seen[:, :, None], rule.momentum)  # the mask is [B, 1, 1, C]
    done, nonfinite, following = position == size - 1, ~finite[:, 0], (position + 1) % size  # each [B]
    nonfinite = nonfinite if updated is None else nonfinite & updated
    if exec_mask is not None:
        done, nonfinite = done & exec_mask, nonfinite & exec_mask
        following = torch.where(exec_mask, following, position)  # [B]
    num_nonfinite = state["spoiled"] + nonfinite
    applied = done & (num_nonfinite == 0)
    descend_(fast, seen_keys, norm, token_scale[-1], applied, rule)
    for buffer in buffers:
        buffer.masked_fill_(row_mask(done, buffer), 0)  # [B, 1, 1, 1] over [B, H, C, any]
    state["skipped"].add_(done > applied)
    state["spoiled"].copy_(num_nonfinite.masked_fill_(done, 0))  # [B]
    position.copy_(following)
    return y.transpose(1, 2).flatten(2)  # [B, H, 1, D] -> [B, 1, H D]
