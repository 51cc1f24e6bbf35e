"""The memory of ``ttt_ridge`` over the tokens of a call: training, and calls with carried state.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, G chunks in a block, H heads, m key width, d value width.
Everything has the state's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.ttt_ridge.memory import Read, RidgeTokens, Rule

LARGEST_SYSTEM = 256
"""How many tokens are solved as one system at most, but in a fresh memory."""


def chunk_ridge(
    tokens: RidgeTokens,
    state: BlockState,
    rule: Rule,
    layout: ChunkLayout,
    checkpoint_chunks: int | None = None,
    *,
    fresh: bool = False,
    want_state: bool = True,
) -> tuple[Read, BlockState]:
    """The memory over the T tokens of a call, and the state after them, but for ``skipped``.

    The tokens of several chunks are solved as one system (``chunks_together``). Its Cholesky factor is causal: the rows
    before a chunk are those of the chunk's own solution, so all chunks read from one factor.

    Args:
        layout: how the tokens lie in chunks; ``position`` in the state is zero in every row without an offset.
        checkpoint_chunks: as in the options; rounded up to chunks that are solved together.
        fresh: the state is ``initial_state``, and nothing is multiplied by its zeros and identities.
        want_state: False returns an empty state.
    """
    size, after = layout.chunk_size, state["position"] + layout.length
    heads, key = tokens.q.shape[2:]
    together = chunks_together(layout, key, fresh=fresh, novelty=rule.novelty is not None)
    written = layout.split(tokens.written[..., None])[..., 0].bool()  # [B, T] -> [B, T, 1] -> [B, N, C]
    parts = (*tokens[:3], tokens.strength[..., None])  # each [B, T, H, any]
    # [B, T, H any] -> [B, H, N, C, any] -> blocks of [B, H, G, C, any]
    q, k, v, strength = (layout.split(part.flatten(2), heads).split(together, dim=2) for part in parts)
    coordinate = state.get("coordinate", torch.zeros_like(after))
    # [B, N]: which coordinate comes first in each chunk
    turns = coordinate[:, None] + written.sum(-1).cumsum(1) - written.sum(-1)

    def block(n: int, now: tuple[Tensor, ...], *given: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        first, count = n * together, given[0].shape[2]
        chunks = slice(first, first + count)
        ends = (torch.arange(first + 1, first + count + 1, device=after.device) * size) <= after[:, None]  # [B, G]
        complete = min(max(layout.length // size - first, 0), count) if layout.offset is None else ends
        # written [B, G, C] and turn [B]
        place = _Place(written[:, chunks], turns[:, first] % key, complete, fresh=fresh and n == 0)
        return _block(now, place, rule, *given, want_state=want_state or first + count < layout.num_chunks)

    names = ("solution", "pending", "covariance", *(("covariance_read",) if rule.variance else ()))
    start = tuple(state[name] for name in names)
    needed = (*tokens[:4], *start, rule.regularization, *(rule.novelty or ()))
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
        checkpoint_chunks = None
    blocks = list(zip(q, k, v, strength, strict=True))
    reads, variances, end = _in_groups(
        block, blocks, start, None if checkpoint_chunks is None else -(-checkpoint_chunks // together)
    )
    # blocks of [B, H, G, C, d] -> [B, T, H, d]
    value = layout.merge(torch.cat(reads, dim=2)).unflatten(-1, (heads, -1))
    variance = layout.merge(torch.cat(variances, dim=2)[..., None]) if rule.variance else None  # [B, T, H]
    if not want_state:
        return Read(value, variance), {}
    found = dict(zip(names, end, strict=True))
    found["position"] = after % size
    if rule.keep != 1:
        found["coordinate"] = (coordinate + tokens.written.sum(1)) % key
    return Read(value, variance), found


def chunks_together(layout: ChunkLayout, key: int, *, fresh: bool, novelty: bool) -> int:
    """How many chunks are solved as one system.

    Between systems the covariance changes, ``4 m^2`` multiplications a token; in a system of b tokens a token costs
    about ``5 b m``. A fresh memory has no covariance to multiply by: one system for as many tokens as a key has
    numbers. Novelty needs what is read before it is written: one chunk.
    """
    if novelty:
        return 1
    if fresh and layout.slots <= key:
        return layout.num_chunks
    return max(1, min(key, LARGEST_SYSTEM) // layout.chunk_size)


class _Place(NamedTuple):
    """Where a block of G chunks is.

    Attributes:
        written: ``[B, G, C]`` bool.
        turn: ``[B]``, the coordinate that the first written token gives its prior back.
        complete: how many of its chunks end in this call, in every row; or ``[B, G]`` bool, which.
        fresh: nothing was written before.
    """

    written: Tensor
    turn: Tensor
    complete: int | Tensor
    fresh: bool


Block = Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def _in_groups(
    block: Block, blocks: Sequence[tuple[Tensor, ...]], now: tuple[Tensor, ...], together: int | None
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Each block's two outputs and what the last one leaves; ``together`` blocks share an activation checkpoint."""
    reads: list[Tensor] = []
    variances: list[Tensor] = []

    def group(first: int, last: int, *given: Tensor) -> tuple[Tensor, ...]:
        width, outputs = len(blocks[0]), []
        now = given[width * (last - first) :]
        for n in range(first, last):
            at = width * (n - first)
            read, variance, now = block(n, now, *given[at : at + width])
            outputs += [read, variance]
        return *outputs, *now

    for first in range(0, len(blocks), together or len(blocks)):
        last = min(first + (together or len(blocks)), len(blocks))
        given = (*(tensor for each in blocks[first:last] for tensor in each), *now)
        if together is None:
            found = group(first, last, *given)
        else:
            found = checkpoint(group, first, last, *given, use_reentrant=False, preserve_rng_state=False)
        outputs, now = found[: 2 * (last - first)], found[2 * (last - first) :]
        reads, variances = [*reads, *outputs[::2]], [*variances, *outputs[1::2]]
    return reads, variances, now


def _block(
    now: tuple[Tensor, ...],
    place: _Place,
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor,
    *,
    want_state: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What the tokens of G chunks read ``[B, H, G, C, d]``, their variances ``[B, H, G, C]``, and the tensors of state.

    With L L^T = lambda I + K P K^T over the rows sqrt(b) k of K, Z = L^-1 K P and E = L^-1 (V - K S): after the first
    n rows the solution is S + Z_n^T E_n and the covariance P - Z_n^T Z_n, with the first n rows of Z and E.

    Args:
        now: the solution to read ``[B, H, m, d]``, that with the unfinished chunk, the covariance ``[B, H, m, m]`` of
            the latter, and with ``rule.variance`` that of the former.
        q, k, v, strength: ``[B, H, G, C, any]``.
    """
    solution, pending, covariance, *begun = now
    chunks, size = q.shape[2:4]
    weight = torch.where(place.written[:, None], strength[..., 0], 0)  # [B, H, G, C]
    if rule.novelty is not None:  # G is 1
        # [B, H, 1, C, m] and [B, H, 1, m, d] -> [B, H, C, d]; weight [B, H, C] -> [B, H, 1, C]
        weight = rule.weight((k @ solution[:, :, None])[:, :, 0], v[:, :, 0], weight[:, :, 0])[:, :, None]
    grown = _grown(place.written, rule.keep, weight.dtype)
    spread, error = _solved(pending, covariance, k, v, weight, place, rule)
    rows = spread.shape[2] // chunks  # observations of a chunk
    chunk = torch.arange(chunks, device=q.device)
    # [(G-1) C, G rows] bool: observations of earlier chunks
    earlier = chunk[1:].repeat_interleave(size)[:, None] > chunk.repeat_interleave(rows)
    first, later = q[:, :, 0], q[:, :, 1:].flatten(2, 3)  # [B, H, C, m] and [B, H, (G-1) C, m]
    known = torch.where(earlier, later @ spread.mT, 0)  # [B, H, (G-1) C, G rows]
    # [B, H, C, d] and [B, H, (G-1) C, d] -> [B, H, G C, d] -> [B, H, G, C, d]
    read = torch.cat([first @ solution, later @ pending + known @ error], dim=2).unflatten(2, (chunks, size))
    variance = read[..., 0]  # [B, H, G, C]: for the shape alone, where variances are not kept
    if begun:
        remaining = ((later @ covariance) * later).sum(-1) - known.square().sum(-1)  # [B, H, (G-1) C]
        remaining = remaining.unflatten(2, (chunks - 1, size)) * grown[:, None, 1:-1, None]  # [B, H, G-1, C]
        # [B, H, C] -> [B, H, 1, C], and [B, H, G-1, C] -> [B, H, G, C]
        variance = torch.cat([((first @ begun[0]) * first).sum(-1)[:, :, None], remaining], dim=2)
    if not want_state:
        return read, variance, now
    solution, begun = _ended(now, spread, error, place.complete, grown)
    return read, variance, (solution, *_after(pending, covariance, spread, error, grown[:, -1]), *begun)


def _after(solution: Tensor, covariance: Tensor, spread: Tensor, error: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
    """The solution ``[B, H, m, d]`` and the covariance ``[B, H, m, m]`` after the observations of Z and E.

    The covariance is symmetric to the last bit: decay would double what is not, again and again.
    """
    gained = spread.mT @ spread
    covariance = (covariance - 0.5 * (gained + gained.mT)) * grown[:, None, None, None]
    return solution + spread.mT @ error, covariance


def _ended(
    now: tuple[Tensor, ...], spread: Tensor, error: Tensor, complete: int | Tensor, grown: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The solution, and the covariance where it is kept, after the last chunk of a block that ended in each row."""
    solution, pending, covariance, *begun = now
    chunks = grown.shape[1] - 1
    rows = spread.shape[2] // chunks
    if isinstance(complete, int):
        if complete == 0:
            return solution, begun
        spread, error = spread[:, :, : complete * rows], error[:, :, : complete * rows]
        solution, covariance = _after(pending, covariance, spread, error, grown[:, complete])
        return solution, [covariance for _ in begun]
    # [B, G] -> [B, 1, G rows, 1]
    spread = torch.where(complete.repeat_interleave(rows, dim=1)[:, None, :, None], spread, 0)
    last = grown.gather(1, complete.sum(1, keepdim=True))[:, 0]  # [B]
    ended, variance = _after(pending, covariance, spread, error, last)
    some = row_mask(complete.any(1), solution)
    return torch.where(some, ended, solution), [torch.where(some, variance, each) for each in begun]


def _grown(written: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
    """``[B, G + 1]``: by how much decay makes variances grow from a block's start to each chunk's, and to the end.

    In a block, all is divided by the share that is left since its start: what a token reads depends on no later one.
    """
    counts = written.sum(-1).cumsum(1)  # [B, G]
    return keep ** -F.pad(counts, (1, 0)).to(dtype)


def _solved(
    solution: Tensor, covariance: Tensor, k: Tensor, v: Tensor, weight: Tensor, place: _Place, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Z ``[B, H, R, m]`` and E ``[B, H, R, d]`` of ``_block``, for R observations in the order in which they are made.

    Args:
        solution, covariance: with everything before the block, ``[B, H, m, d]`` and ``[B, H, m, m]``.
        k, v: ``[B, H, G, C, m]`` and ``[B, H, G, C, d]``.
        weight: ``[B, H, G, C]``, zero where nothing is written.
    """
    regularization = rule.regularization[:, None, None]  # [H, 1, 1]
    k, v, weight = (part.flatten(2, 3) for part in (k, v, weight))  # [B, H, G C, any]
    if rule.keep != 1:
        k, v, weight = _aged(k, v, weight, place, rule)
    root = torch.where(weight > 0, weight, 1).sqrt() * (weight > 0)  # its derivative is finite at zero too
    k, v = k * root[..., None], v * root[..., None]  # [B, H, R, 1] over [B, H, R, any]
    spread, error = (k, v) if place.fresh else (k @ covariance, v - k @ solution)
    identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    system = spread @ k.mT  # [B, H, R, m] and [B, H, m, R] -> [B, H, R, R]
    system = 0.5 * (system + system.mT) + regularization * identity
    factor, _ = torch.linalg.cholesky_ex(system)
    both = torch.linalg.solve_triangular(factor, torch.cat([spread, error], dim=-1), upper=False)  # [B, H, R, m + d]
    spread, error = both.split_with_sizes([k.shape[-1], v.shape[-1]], dim=-1)  # [B, H, R, m] and [B, H, R, d]
    return spread, error


def _aged(k: Tensor, v: Tensor, weight: Tensor, place: _Place, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Decay in a block: a pseudo-observation before each token, and weights that grow with each token written.

    ``k [B, H, G C, m]``, ``v [B, H, G C, d]`` and ``weight [B, H, G C]`` become twice as long.
    """
    width = k.shape[-1]
    written = place.written.flatten(1)  # [B, G C]
    order = written.cumsum(-1)  # from 1
    age = rule.keep ** -order.to(weight.dtype)
    coordinate = (place.turn[:, None] + order - 1) % width
    # [B, G C, m] -> [B, H, G C, m]
    pseudo = (coordinate[..., None] == torch.arange(width, device=k.device)).to(k.dtype)
    pseudo = pseudo[:, None].expand_as(k)
    added = (1 - rule.keep) * width * rule.regularization[:, None] * torch.where(written, age, 0)[:, None]
    # two of [B, H, G C, any] -> [B, H, 2 G C, any], in turn
    return (
        torch.stack([pseudo, k], dim=3).flatten(2, 3),
        torch.stack([torch.zeros_like(v), v], dim=3).flatten(2, 3),
        torch.stack([added, weight * age[:, None]], dim=3).flatten(2, 3),
    )
