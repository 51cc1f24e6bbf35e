"""Diagnostics of in-place TTT: drift, health figures and their red flags, the inner loss by token.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.gated_mlp import GatedMLP, output_projection
from moshi_ttt.plugins.common.finite import finite_tokens
from moshi_ttt.plugins.common.inner_curves import curves
from moshi_ttt.plugins.gating_mlp import chunkwise
from moshi_ttt.plugins.gating_mlp.chunk import CallTokens
from moshi_ttt.plugins.gating_mlp.memory import Memory


def drift(update: Tensor, mlp: GatedMLP) -> Tensor:
    """``[B]`` float64: the norm of each row's accumulated ``update [B, d, h]`` over that of W_0 and its LoRA."""
    parts = [_norms(parameter.flatten()) for parameter in output_projection(mlp).parameters()]
    return _norms(update.flatten(1)) / _norms(torch.stack(parts))  # [B, d h] -> [B]


def figures(key: Tensor, target: Tensor, rate: Tensor, strength: Tensor, conv: Tensor) -> dict[str, Tensor]:
    """The health figures: scalars, of ``key [B, T, h]``, ``target [B, T, d]``, ``rate [B, T, 1]`` and the filter.

    ``strength [B, T, 1]`` is the write strength, of which ``rate`` is the root with ``update: ridge``.
    """
    return {
        "key_norm": key.norm(dim=-1).max(),
        "target_norm": target.norm(dim=-1).max(),
        "rate": strength.max(),
        "nonfinite_tokens": (~finite_tokens(key, target, rate)).float().mean(),
        "filter": conv.abs().max(),
    }


def red_flags(figures: Mapping[str, float]) -> list[str]:
    """A sentence for each abnormal figure, as read."""
    if figures["nonfinite_tokens"] > 0:
        return [
            f"{figures['nonfinite_tokens']:.1%} of the tokens are not finite or too large, so the updates of their "
            "chunks are skipped: lower lr, or look at the input."
        ]
    return []


def _norms(rows: Tensor) -> Tensor:
    """Norms over the last dimension, summed in float64 without a copy in it."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms


def inner_loss_curves(tokens: CallTokens, layout: ChunkLayout, memory: Memory, projection: Tensor) -> dict[str, Tensor]:
    """1/2 || D h_t - v_t ||^2 ``[B, 1, T]``: the accumulated update D, without W_0, as a predictor of the target v_t.

    At the initial D, which is zero, and before and after each update. With ``update: hebbian`` a diagnostic, not what
    is minimized: it adds v_t h_t^T and reconstructs nothing. The other updates minimize it, before the projection. For
    the filter, which may look ahead, the sequence's end is its last chunk's end.

    Args:
        tokens: of a sequence from its beginning, with the state wanted.
        layout: of the sequence.
        memory: of the block.
        projection: ``[d, d]``.
    """
    size, chunks = memory.schedule.chunk, tokens.chunks
    queries, target, projection = _queries_and_targets(tokens, layout, memory, projection)
    start = delta = queries.new_zeros(queries.shape[0], queries.shape[-1], memory.width)  # [B, h, d]
    found: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
    for n, query in enumerate(queries.split(size, 1)):  # [B, C, h]
        scale = chunks.scale[:, n]  # [B]
        values = chunks.values[:, n] * scale[:, None, None]  # [B, C, d] times [B, 1, 1]
        found["initial"].append(query @ start @ projection)
        found["before"].append(query @ delta @ projection)
        if query.shape[1] == size:
            complete = chunks.complete[:, n]  # [B]
            delta = chunkwise.after_chunk(delta, chunks.keys[n], values, complete, scale != 0, memory.decay)
            found["after"].append(query @ delta @ projection)
    # One head: [B, C, d] -> [B, 1, C, d], and [B, T, d] -> [B, 1, T, d]
    by_head = {name: [chunk[:, None] for chunk in chunks] for name, chunks in found.items()}
    return curves(target[:, None], by_head)  # [B, T, d] -> [B, 1, T, d]


def losses_at(tokens: CallTokens, layout: ChunkLayout, memory: Memory, projection: Tensor, update: Tensor) -> Tensor:
    """The loss of ``inner_loss_curves`` at the accumulated ``update [B or 1, h, d]``, ``[B, 1, T]``.

    NaN for the last tokens, which the filter would need the tokens after them for.
    """
    queries, target, projection = _queries_and_targets(tokens, layout, memory, projection)
    found = curves(target[:, None], {"now": [(queries @ update @ projection)[:, None]]})["now"]
    known = torch.arange(layout.length, device=found.device) < layout.length - memory.schedule.look_ahead
    return found.masked_fill(~known, torch.nan)  # [T] over [B, 1, T]


def _queries_and_targets(
    tokens: CallTokens, layout: ChunkLayout, memory: Memory, projection: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, T, h]``, ``[B, T, d]``, and ``[d, d]``: what the memory is asked, what it should give, and through what."""
    size, length = memory.schedule.chunk, layout.length
    queries, chunks = tokens.queries[:, :length], tokens.chunks  # [B, N C, h] -> [B, T, h]
    projection = projection.to(queries)
    target = layout.merge(chunks.conv_tail[:, :, :size, :-1])  # [B, N, C, d] -> [B, T, d]
    if tokens.answers is not None:  # what was subtracted is added again
        projection = torch.eye(memory.width, dtype=queries.dtype, device=queries.device)
        target = target + tokens.answers[:, :length]  # [B, T, d]
    return queries, target @ projection, projection
