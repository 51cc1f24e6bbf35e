"""The chunk form of the inner loop with its backward pass written out: the published form, in float32 and float64.

It computes what ``chunk`` does with fewer operations, and keeps less between the passes. ``chunk_passes`` and
``chunk_backward`` have one chunk, and ``chunk_groups`` goes through them. What does not depend on the fast weights, the
products of queries with keys and the output's LayerNorm, is computed for all chunks at once.

Shape legend: B streams, H heads, R = B H rows, T tokens, N chunks, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class WholeChunks(Protocol):
    """Chunks that are whole in every row, from one's start, by other code."""

    def __call__(
        self,
        tokens: Tokens,
        fast: FastNetwork,
        norm: InnerNorm,
        token_scale: Tensor,
        scale: Tensor,
        *,
        causal: bool,
        together: int | None,
    ) -> tuple[Tensor, FastNetwork]:
        """``y [B, T, H, D]`` and the fast weights after the last token, differentiable.

        Args:
            tokens: finite, ``[B, T, H, any]``, T a multiple of C.
            fast: what to start from, ``[B, H, any, any]``.
            scale: ``[B, N]``, of each chunk's update; 0 where there is none.
            together: as ``checkpoint_chunks``.
        """
        ...


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
    whole: WholeChunks | None = None,
) -> tuple[Tensor, FastNetwork, ChunkMemory]:
    """``y [B, T, H D]``, the fast weights and the unfinished chunk after the last token.

    Args:
        tokens: finite, ``[B, T, H, any]``.
        fast, earlier: what the call starts from, ``[B, H, any, any]``.
        position: ``[B]``, tokens of the first chunk that came before the call.
        applied: ``[B, N]`` bool, chunks whose update is applied if they end in this call.
        whole: what computes the chunks that are whole in every row. None: they are computed as the others are.

    The rest is as in ``chunk_inner_loop``.
    """
    call = _Chunks(tokens, earlier, norm, token_scale, layout, causal, checkpoint_chunks, position, applied)
    first, last = whole_chunks(layout) if whole is not None else (0, 0)
    outputs: list[Tensor] = []
    left: ChunkMemory | None = None
    if whole is None or first >= last:
        y, fast, left = call.part(0, layout.num_chunks, fast, left)
        return layout.merge(y), fast, left
    if first > 0:
        y, fast, left = call.part(0, first, fast, left)
        outputs.append(y)
    factor = torch.where(applied[:, first:last], token_scale[-1], 0)  # [B, N]
    y, fast = whole(
        call.tokens(first, last), fast, norm, token_scale, factor, causal=causal, together=checkpoint_chunks
    )
    # [B, T, H, D] -> [B, T, H D] -> [B, N, C, H D]
    outputs.append(y.flatten(2).unflatten(1, (last - first, layout.chunk_size)))
    if last < layout.num_chunks:
        y, fast, left = call.part(last, layout.num_chunks, fast, left)
        outputs.append(y)
    left = call.nothing_left() if left is None else left
    return layout.merge(torch.cat(outputs, 1)), fast, left


def whole_chunks(layout: ChunkLayout) -> tuple[int, int]:
    """The first chunk that is whole in every row and not begun before the call, and the one after the last of them."""
    return (0 if layout.offset is None else 1), layout.length // layout.chunk_size


class _Chunks:
    """The chunks of one call, any of which ``part`` computes in order."""

    def __init__(
        self, tokens: Tokens, earlier: ChunkMemory, norm: InnerNorm, token_scale: Tensor, layout: ChunkLayout,
        causal: bool, checkpoint_chunks: int | None, position: Tensor, applied: Tensor,
    ) -> None:  # fmt: skip
        self.rows = _Rows(tokens.q.shape[0], tokens.q.shape[2])
        self.given, self.layout, self.norm, self.checkpoint_chunks = tokens, layout, norm, checkpoint_chunks
        self.earlier, self.token_scale, self.after = earlier, token_scale, position + layout.length
        self.begun = None
        if layout.offset is not None:
            slot = torch.arange(layout.chunk_size, device=position.device)
            self.begun = self.rows.of_mask((slot < position[:, None])[..., None])  # [B, C, 1] -> [R, C, 1]
        mask = -token_scale[:, None].expand(-1, layout.chunk_size)  # [C, C]: query, key
        self.mask = mask.tril() if causal else mask
        self.applied = _applied(layout, self.after, applied, self.rows, tokens.q.dtype)
        self.stops = _stops(layout, self.after, self.rows)

    def tokens(self, first: int, last: int) -> Tokens:
        """Those of chunks ``first`` to ``last - 1``, which are whole in every row: ``[B, T, H, any]``."""
        layout, heads = self.layout, self.rows.heads
        if layout.offset is None:
            at = slice(first * layout.chunk_size, last * layout.chunk_size)
            return Tokens(*(part[:, at] for part in self.given))
        # [B, T, H any] -> [B, N, C, H any] -> [B, N C, H any]
        q, k, v, lr = (layout.split(part.flatten(2))[:, first:last].flatten(1, 2) for part in self.given)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))  # [B, T, H D] -> [B, T, H, D]
        return Tokens(q, k, v, lr)

    def part(
        self, first: int, last: int, fast: FastNetwork, left: ChunkMemory | None
    ) -> tuple[Tensor, FastNetwork, ChunkMemory]:
        """Chunks ``first`` to ``last - 1``: ``y [B, N, C, H D]``, the fast weights, and the unfinished chunk after.

        ``left``: the unfinished chunk of rows whose call ended before; None before the first.
        """
        rows, layout, count = self.rows, self.layout, last - first
        # [N, R, C, any]
        q, k, v, lr = (rows.of_tokens(part, layout, first, last) for part in self.given)
        if first == 0 and self.begun is not None:
            start = torch.where(self.begun, self.earlier.inputs[0].flatten(0, 1), k[0])  # [B, H, C, D] -> [R, C, D]
            k = torch.cat([start[None], k[1:]])
        gamma, beta = (rows.of_heads(each) for each in (self.norm.weight, self.norm.bias))  # [H, D] -> [R, 1, D]
        left = self.nothing_left() if left is None else left
        slots = self.begun if first == 0 else None
        plan = ChunkGroup(self.norm.eps, first, first, self.applied, self.stops, slots, len(fast.weights))

        def shared(x: Tensor) -> Tensor:
            return x.expand(count, *x.shape)  # [any] -> [N, any]

        def flat(*parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
            return tuple(tuple(t.flatten(0, 1) for t in part) for part in parts)  # [B, H, a, b] -> [R, a, b]

        given = Arguments(
            torch.cat([k, q], 2), beta - self.norm.target(v, k), lr.contiguous(), shared(gamma), shared(beta),
            shared(self.mask), shared(-self.token_scale[-1:, None, None]), *flat(fast.weights, fast.biases),
            *flat(left.inputs[1:], left.gradients), *flat(self.earlier.inputs[1:], self.earlier.gradients),
        )  # fmt: skip
        found, (weights, biases, inputs, gradients) = in_groups(plan, given, self.checkpoint_chunks)
        # [N, R, C, D] -> [N, B, H, C, D] -> [B, N, C, H, D] -> [B, N, C, H D]
        y = (q + found).unflatten(1, (rows.batch, rows.heads)).permute(1, 0, 3, 2, 4).flatten(-2)
        stops = self.stops[first:last]
        memory = _unfinished(layout, self.after, rows, stops, left.inputs[0].flatten(0, 1), (k, *inputs), gradients)
        return y, FastNetwork(*(tuple(map(rows.restore, part)) for part in (weights, biases))), memory

    def nothing_left(self) -> ChunkMemory:
        """An unfinished chunk without tokens."""
        return ChunkMemory(*(tuple(map(torch.zeros_like, p)) for p in (self.earlier.inputs, self.earlier.gradients)))


@dataclass
class _Rows:
    """R rows, of B streams and H heads."""

    batch: int
    heads: int

    def of_tokens(self, x: Tensor, layout: ChunkLayout, first: int, last: int) -> Tensor:
        """Chunks of ``[B, T, H, D]`` or ``[B, T, H]`` as ``[N, R, C, D]``, D = 1 of the latter."""
        chunks = layout.split(x.flatten(2), self.heads)[:, :, first:last]  # [B, H, N, C, D]
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
    size, last = layout.chunk_size, layout.length // layout.chunk_size
    if layout.offset is not None:
        end = size * torch.arange(1, layout.num_chunks + 1, device=after.device)  # [N]
        applied, last = applied & (after[:, None] >= end), layout.num_chunks  # [B, 1] and [N] -> [B, N]
    # [B, N] -> [N, B, 1] -> [N, B, H] -> [N, R, 1, 1] -> N times [R, 1, 1]
    ends = applied.to(dtype).t()[..., None].expand(-1, -1, rows.heads).flatten(1)[..., None, None].unbind(0)
    return [each if n < last else None for n, each in enumerate(ends)]


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
    layout: ChunkLayout,
    after: Tensor,
    rows: _Rows,
    stops: Sequence[Tensor | None],
    last: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> ChunkMemory:
    """The unfinished chunk: keys from those of chunks ``inputs[0] [N, R, C, D]``, in rows that ``stops`` in one.

    ``last [R, C, D]``: the keys of rows that stopped before. No slot ahead holds anything.
    """
    for keys, stopping in zip(inputs[0], stops, strict=True):
        if stopping is not None:
            last = torch.where(stopping, keys, last)
    held = torch.arange(layout.chunk_size, device=after.device) < (after % layout.chunk_size)[:, None]  # [B, C]
    held = rows.of_mask(held[..., None])
    a = tuple(rows.restore(torch.where(held, each, 0)) for each in (last, *inputs[1:]))
    return ChunkMemory(a, tuple(map(rows.restore, gradients)))
