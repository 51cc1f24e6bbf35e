"""The chunk form of the inner loop with its backward pass written out: the published form, in float32 and float64.

It computes what ``chunk`` does with fewer operations, and keeps less between the passes. ``chunk_passes`` and
``chunk_backward`` have one chunk, and ``chunk_groups`` goes through them. What does not depend on the fast weights, the
products of queries with keys and the output's LayerNorm, is computed for all chunks at once.

Shape legend: B streams, H heads, R = B H rows, T tokens, N chunks, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.hybrid.chunk_groups import Arguments, ChunkGroup, in_groups
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective


def is_written_out(norm: Objective, rule: UpdateRule, dtype: torch.dtype) -> bool:
    """Whether this module computes the inner loop with these options."""
    published = isinstance(norm, InnerNorm) and not norm.exact and rule.momentum is None and rule.steps == 1
    return published and dtype in (torch.float32, torch.float64)


def written_out_inner_loop(
    tokens: Tokens,
    fast: FastNetwork,
    earlier: ChunkMemory,
    norm: InnerNorm,
    token_scale: Tensor,
    *,
    layout: ChunkLayout,
    causal: bool,
    checkpoint_chunks: int | None,
    position: Tensor,
    applied: Tensor,
) -> tuple[Tensor, FastNetwork, ChunkMemory]:
    """``y [B, T, H D]``, the fast weights and the unfinished chunk after the last token.

    Args:
        tokens: finite, ``[B, T, H, any]``.
        fast, earlier: what the call starts from, ``[B, H, any, any]``.
        position: ``[B]``, tokens of the first chunk that came before the call.
        applied: ``[B, N]`` bool, chunks whose update is applied if they end in this call.

    The rest is as in ``chunk_inner_loop``.
    """
    rows = _Rows(tokens.q.shape[0], tokens.q.shape[2])
    q, k, v, lr = (rows.of_tokens(part, layout) for part in tokens)  # [N, R, C, any]
    begun = None
    if layout.offset is not None:
        slot = torch.arange(layout.chunk_size, device=position.device)
        begun = rows.of_mask((slot < position[:, None])[..., None])  # [B, C, 1] -> [R, C, 1]
        first = torch.where(begun, earlier.inputs[0].flatten(0, 1), k[0])  # [B, H, C, D] -> [R, C, D]
        k = torch.cat([first[None], k[1:]])
    gamma, beta = (rows.of_heads(each) for each in (norm.weight, norm.bias))  # [H, D] -> [R, 1, D]
    mask = -token_scale[:, None].expand(-1, layout.chunk_size)  # [C, C]: query, key
    mask = mask.tril() if causal else mask
    after = position + layout.length
    plan = ChunkGroup(
        norm.eps, 0, 0, _applied(layout, after, applied, rows, q.dtype), _stops(layout, after, rows), begun,
        len(fast.weights),
    )  # fmt: skip

    def shared(x: Tensor) -> Tensor:
        return x.expand(layout.num_chunks, *x.shape)  # [any] -> [N, any]

    given = Arguments(
        torch.cat([k, q], 2), beta - norm.target(v, k), lr.contiguous(), shared(gamma), shared(beta), shared(mask),
        shared(-token_scale[-1:, None, None]),
        *(tuple(t.flatten(0, 1) for t in part) for part in (fast.weights, fast.biases)),  # [B, H, a, b] -> [R, a, b]
        *(tuple(torch.zeros_like(t).flatten(0, 1) for t in part) for part in (earlier.inputs[1:], earlier.gradients)),
        *(tuple(t.flatten(0, 1) for t in part) for part in (earlier.inputs[1:], earlier.gradients)),
    )  # fmt: skip
    found, (weights, biases, inputs, gradients) = in_groups(plan, given, checkpoint_chunks)
    # [N, R, C, D] -> [N, B, H, C, D] -> [B, H, N, C, D]
    y = layout.merge((q + found).unflatten(1, (rows.batch, rows.heads)).permute(1, 2, 0, 3, 4))
    left = _unfinished(layout, after, rows, (k, *inputs), gradients)
    return y, FastNetwork(*(tuple(map(rows.restore, part)) for part in (weights, biases))), left


@dataclass
class _Rows:
    """R rows, of B streams and H heads."""

    batch: int
    heads: int

    def of_tokens(self, x: Tensor, layout: ChunkLayout) -> Tensor:
        """``[B, T, H, D]`` or ``[B, T, H]`` to ``[N, R, C, D]``, D = 1 of the latter."""
        chunks = layout.split(x.flatten(2), self.heads)  # [B, H, N, C, D]
        return chunks.permute(2, 0, 1, 3, 4).flatten(1, 2)

    def of_heads(self, x: Tensor) -> Tensor:
        """``[H, D]`` to ``[R, 1, D]``."""
        return x.expand(self.batch, -1, -1).flatten(0, 1)[:, None]

    def of_mask(self, mask: Tensor) -> Tensor:
        """``[B or 1, C, 1]`` to ``[R, C, 1]``."""
        return mask.expand(self.batch, -1, -1).repeat_interleave(self.heads, 0)

    def restore(self, x: Tensor) -> Tensor:
        """``[R, any, any]`` to ``[B, H, any, any]``."""
        restored: Tensor = x.unflatten(0, (self.batch, self.heads))
        return restored


def _applied(
    layout: ChunkLayout, after: Tensor, applied: Tensor, rows: _Rows, dtype: torch.dtype
) -> list[Tensor | None]:
    """Of each chunk ``[R, 1, 1]``, 1 where its update is applied, else 0; None where it ends in no row."""
    size = layout.chunk_size
    ends: list[Tensor | None] = []
    for n, row in enumerate(applied.unbind(1)):
        if layout.offset is None:
            ends.append(rows.of_mask(row[:, None, None]).to(dtype) if (n + 1) * size <= layout.length else None)
        else:
            ends.append(rows.of_mask((row & (after >= (n + 1) * size))[:, None, None]).to(dtype))
    return ends


def _stops(layout: ChunkLayout, after: Tensor, rows: _Rows) -> list[Tensor | None]:
    """Of each chunk ``[R, 1, 1]`` bool, the rows whose call ends in it, unfinished; None where there is none."""
    size = layout.chunk_size
    stops: list[Tensor | None] = []
    for n in range(layout.num_chunks):
        if (n + 1) * size <= layout.length:  # wherever a row began, an earlier chunk ends in this call
            stops.append(None)
        elif layout.offset is None:
            stops.append(rows.of_mask(torch.ones_like(after, dtype=torch.bool)[:, None, None]))
        else:
            stops.append(rows.of_mask(((after >= n * size) & (after < (n + 1) * size))[:, None, None]))
    return stops


def _unfinished(
    layout: ChunkLayout, after: Tensor, rows: _Rows, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> ChunkMemory:
    """The unfinished chunk: keys from those of all chunks ``inputs[0] [N, R, C, D]``; no slot ahead holds anything."""
    size, k = layout.chunk_size, inputs[0]
    last = torch.zeros_like(k[0])
    for n, stops in enumerate(_stops(layout, after, rows)):
        if stops is not None:
            last = torch.where(stops, k[n], last)
    held = torch.arange(size, device=after.device) < (after % size)[:, None]  # [C] and [B, 1] -> [B, C]
    held = rows.of_mask(held[..., None])
    a = tuple(rows.restore(torch.where(held, each, 0)) for each in (last, *inputs[1:]))
    return ChunkMemory(a, tuple(map(rows.restore, gradients)))
