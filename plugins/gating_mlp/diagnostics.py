"""Diagnostics of in-place TTT: the inner loss by token.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.common.inner_curves import curves
from moshi_ttt.plugins.gating_mlp import chunkwise
from moshi_ttt.plugins.gating_mlp.chunk import CallTokens
from moshi_ttt.plugins.gating_mlp.memory import Memory


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
        scale = chunks.scale[:, n]
        values = chunks.values[:, n] * scale[:, None, None]  # [B, C, d] times [B, 1, 1]
        found["initial"].append(query @ start @ projection)
        found["before"].append(query @ delta @ projection)
        if query.shape[1] == size:
            delta = chunkwise.after_chunk(
                delta, chunks.keys[n], values, chunks.complete[:, n], scale != 0, memory.decay
            )  # fmt: skip
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
    queries, chunks = tokens.queries[:, :length], tokens.chunks
    projection = projection.to(queries)
    target = layout.merge(chunks.conv_tail[:, :, :size, :-1])  # [B, N, C, d] -> [B, T, d]
    if tokens.answers is not None:  # what was subtracted is added again
        projection = torch.eye(memory.width, dtype=queries.dtype, device=queries.device)
        target = target + tokens.answers[:, :length]
    return queries, target @ projection, projection
