"""The memory of ``ttt_ridge``: the regularized least-squares solution of what a stream has heard.

Keys k_t, values v_t and write strengths b_t of all earlier tokens make, per stream and head,

    S = argmin sum over t of b_t |v_t - S^T k_t|^2 + lambda |S|^2
      = (lambda I + sum b_t k_t k_t^T)^-1 sum b_t k_t v_t^T

(ridge regression; von Oswald et al. 2025, "MesaNet", arXiv:2506.05233, solve it for each token). By chunk: a token
reads S^T q_t with the solution of all chunks before its own. What is kept is S and the posterior covariance over its
prior's, P = lambda (lambda I + sum b_t k_t k_t^T)^-1, which starts at I. A token changes both by one outer product

    u = P k,  c = b / (lambda + b k . u),  S <- S + c u (v - S^T k)^T,  P <- P - c u u^T

(recursive least squares, the Sherman-Morrison formula), and the tokens of a chunk together by a system of that many
equations (Woodbury). Both are exact; in float32 they drift apart with the length of the stream (README.md has figures).

With ``decay`` each token that is written first divides what was known, the prior with it, by gamma, and adds the prior
back in one coordinate, in turn: a pseudo-observation of value zero with the weight lambda (1 - gamma) m along e_i. The
prior's weight then stays lambda on the average of the m coordinates.

A token that takes no part (updates disabled, not finite, or no token at all) has ``written`` false and changes nothing.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, H heads, m key width, d value width. Everything has the
state's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.common.success_gate import cosine


class Tokens(NamedTuple):
    """What enters the memory.

    Attributes:
        q, k: ``[B, T, H, m]``, of norm 1 or zero.
        v: ``[B, T, H, d]``.
        strength: ``[B, T, H]``, of each write, at least zero; finite, whatever ``written``.
        written: ``[B, T]`` bool, the tokens that are written.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    strength: Tensor
    written: Tensor


class Read(NamedTuple):
    """What the memory gives: ``value [B, T, H, d]``, and with ``variance`` q . P q ``[B, T, H]``, else None."""

    value: Tensor
    variance: Tensor | None


@dataclass
class Rule:
    """How tokens are written and read.

    Attributes:
        regularization: lambda, ``[H]``.
        keep: gamma, the share of what was known that a written token leaves; 1 forgets nothing.
        novelty: offset and slope ``[H]``: a write is weighted by sigmoid(offset - slope cos(S^T k, v)); None: by 1.
        variance: give the variance of each query too.
    """

    regularization: Tensor
    keep: float = 1.0
    novelty: tuple[Tensor, Tensor] | None = None
    variance: bool = False

    def weight(self, read: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        """The weight of writes, ``[..., H, C]`` like ``strength``, where ``read`` and ``value [..., H, C, d]``."""
        if self.novelty is None:
            return strength
        offset, slope = (part[:, None] for part in self.novelty)
        return strength * torch.sigmoid(offset - slope * cosine(read, value))


# ---- state: the solution that is read, the one with the unfinished chunk's tokens too, the covariance of the latter


def initial_state(
    batch: int, heads: int, key: int, value: int, like: Tensor, *, decays: bool, variance: bool
) -> BlockState:
    """Nothing heard: solutions of zero and covariances I, in the dtype and on the device of ``like``.

    Counted are tokens of the unfinished chunk, tokens left out as not finite, and, where the memory ``decays``, the
    coordinate that gets its prior back next. With ``variance`` the covariance at the chunk's start is kept too.
    """
    zeros = like.new_zeros(1, heads, key, value).expand(batch, -1, -1, -1)
    identity = torch.eye(key, dtype=like.dtype, device=like.device).expand(batch, heads, -1, -1)
    counters = ("position", "skipped", "coordinate") if decays else ("position", "skipped")
    state: BlockState = {name: torch.zeros(batch, dtype=torch.int64, device=like.device) for name in counters}
    state |= {"solution": zeros, "pending": zeros, "covariance": identity}
    return {**state, "covariance_read": identity} if variance else state


# ---- a call


def run(
    tokens: Tokens, state: BlockState, rule: Rule, layout: ChunkLayout, checkpoint_chunks: int | None = None
) -> tuple[Read, BlockState]:
    """The memory over the T tokens of a call, and the state after them, but for ``skipped``.

    ``layout`` says how the tokens lie in chunks; ``position`` in the state is zero in every row without an offset.
    ``checkpoint_chunks`` as in the options.
    """
    size, after = layout.chunk_size, state["position"] + layout.length
    heads, key = tokens.q.shape[2:]
    written = layout.split(tokens.written[..., None])[..., 0].bool()  # [B, N, C]
    # [B, T, H, any] -> N of [B, H, C, any]
    q, k, v, strength = (
        layout.split(part.flatten(2), heads).unbind(2) for part in (*tokens[:3], tokens.strength[..., None])
    )
    coordinate = state.get("coordinate", torch.zeros_like(after))
    # [B, N]: which coordinate comes first in each chunk
    turns = coordinate[:, None] + written.sum(-1).cumsum(1) - written.sum(-1)

    def chunk(n: int, now: tuple[Tensor, ...], *given: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v, strength = given
        solution, pending, covariance, *begun = now  # with the chunk's first covariance where variances are asked for
        strength = torch.where(written[:, n, None], strength[..., 0], 0)
        read, weight = q @ solution, strength
        if rule.novelty is not None:
            weight = rule.weight(k @ solution, v, strength)
        variance = (q @ begun[0] * q).sum(-1) if begun else read[..., 0]
        pending, covariance = _written(pending, covariance, k, v, weight, written[:, n], turns[:, n] % key, rule)
        if layout.offset is not None:
            ended = row_mask(after >= (n + 1) * size, pending)
            solution = torch.where(ended, pending, solution)
            begun = [torch.where(ended, covariance, each) for each in begun]
        elif (n + 1) * size <= layout.length:
            solution, begun = pending, [covariance for _ in begun]
        return read, variance, (solution, pending, covariance, *begun)

    names = ("solution", "pending", "covariance", *(("covariance_read",) if rule.variance else ()))
    start = tuple(state[name] for name in names)
    needed = (*tokens[:4], *start, rule.regularization, *(rule.novelty or ()))
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
        checkpoint_chunks = None
    chunks = list(zip(q, k, v, strength, strict=True))
    reads, variances, end = _in_groups(chunk, chunks, start, checkpoint_chunks)
    found = dict(zip(names, end, strict=True))
    found["position"] = after % size
    if rule.keep != 1:
        found["coordinate"] = (coordinate + tokens.written.sum(1)) % key
    # N of [B, H, C, d] -> [B, T, H, d]
    value = layout.merge(torch.stack(reads, dim=2)).unflatten(-1, (heads, -1))
    variance = layout.merge(torch.stack(variances, dim=2)[..., None]) if rule.variance else None  # [B, T, H]
    return Read(value, variance), found


Chunk = Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def _in_groups(
    chunk: Chunk, chunks: Sequence[tuple[Tensor, ...]], now: tuple[Tensor, ...], together: int | None
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """Each chunk's two outputs and what the last one leaves; ``together`` chunks share an activation checkpoint."""
    reads: list[Tensor] = []
    variances: list[Tensor] = []

    def group(first: int, last: int, *given: Tensor) -> tuple[Tensor, ...]:
        width, outputs = len(chunks[0]), []
        now = given[width * (last - first) :]
        for n in range(first, last):
            at = width * (n - first)
            read, variance, now = chunk(n, now, *given[at : at + width])
            outputs += [read, variance]
        return *outputs, *now

    for first in range(0, len(chunks), together or len(chunks)):
        last = min(first + (together or len(chunks)), len(chunks))
        given = (*(tensor for each in chunks[first:last] for tensor in each), *now)
        if together is None:
            found = group(first, last, *given)
        else:
            found = checkpoint(group, first, last, *given, use_reentrant=False, preserve_rng_state=False)
        outputs, now = found[: 2 * (last - first)], found[2 * (last - first) :]
        reads, variances = [*reads, *outputs[::2]], [*variances, *outputs[1::2]]
    return reads, variances, now


def _written(
    solution: Tensor,
    covariance: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    written: Tensor,
    turn: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """The solution ``[B, H, m, d]`` and the covariance ``[B, H, m, m]`` after the tokens of a chunk.

    With L L^T = lambda I + K P K^T over the rows sqrt(weight) k of K, and Y = L^-1 K P: P - Y^T Y and
    S + Y^T L^-1 (V - K S).

    Args:
        k, v: ``[B, H, C, m]`` and ``[B, H, C, d]``.
        weight: ``[B, H, C]``, zero where nothing is written.
        written: ``[B, C]`` bool.
        turn: ``[B]``, the coordinate that the first written token gives its prior back.
    """
    regularization = rule.regularization[:, None]  # [H, 1]
    if rule.keep != 1:
        covariance, k, v, weight = _aged(covariance, k, v, weight, written, turn, rule, regularization)
    root = torch.where(weight > 0, weight, 1).sqrt() * (weight > 0)  # its derivative is finite at zero too
    k, v = k * root[..., None], v * root[..., None]
    spread = k @ covariance  # [B, H, C, m]
    identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    system = spread @ k.mT
    system = 0.5 * (system + system.mT) + regularization[..., None] * identity
    factor, _ = torch.linalg.cholesky_ex(system)
    both = torch.linalg.solve_triangular(factor, torch.cat([spread, v - k @ solution], dim=-1), upper=False)
    spread, error = both.split_with_sizes([k.shape[-1], v.shape[-1]], dim=-1)
    known = spread.mT @ spread
    # Symmetric to the last bit: decay would double what is not, again and again.
    return solution + spread.mT @ error, covariance - 0.5 * (known + known.mT)


def _aged(
    covariance: Tensor, k: Tensor, v: Tensor, weight: Tensor, written: Tensor, turn: Tensor, rule: Rule, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay in a chunk: the covariance that it begins with, and keys, values and weights with pseudo-observations.

    What a token writes has aged by the tokens after it; C pseudo-observations follow the C tokens.
    """
    width = k.shape[-1]
    count = written.sum(-1)  # [B]
    order = written.cumsum(-1)  # [B, C], from 1
    age = rule.keep ** (count[:, None] - order).to(weight.dtype)  # [B, C]
    covariance = covariance / rule.keep ** count.to(weight.dtype)[:, None, None, None]
    coordinate = (turn[:, None] + order - 1) % width
    # [B, C, m] -> [B, H, C, m]
    pseudo = (coordinate[..., None] == torch.arange(width, device=k.device)).to(k.dtype)
    pseudo = pseudo[:, None].expand(-1, k.shape[1], -1, -1)
    added = (1 - rule.keep) * width * prior * torch.where(written, age, 0)[:, None]  # [B, H, C]
    return (
        covariance,
        torch.cat([k, pseudo], dim=2),
        torch.cat([v, torch.zeros_like(v)], dim=2),
        torch.cat([weight * age[:, None], added], dim=2),
    )


# ---- a streamed step


@torch.no_grad()
def step(tokens: Tokens, state: BlockState, rule: Rule, chunk_size: int, exec_mask: Tensor | None = None) -> Read:
    """One token of every stream; ``state`` is updated in place and no value is read on the host.

    Every step costs the same, a chunk's last one too: two products with a vector, two outer products and a masked copy.
    Rows where ``exec_mask [B]`` is false stay bit-equal.
    """
    # [B, 1, H, any] -> [B, H, 1, any]
    q, k, v = (part.transpose(1, 2) for part in tokens[:3])
    written, position = tokens.written[:, 0], state["position"]
    solution, pending, covariance = state["solution"], state["pending"], state["covariance"]
    following, done = (position + 1) % chunk_size, position == chunk_size - 1
    if exec_mask is not None:
        written, done = written & exec_mask, done & exec_mask
        following = torch.where(exec_mask, following, position)
    read, variance = q @ solution, None
    if rule.variance:
        variance = (q @ state["covariance_read"] * q).sum(-1).transpose(1, 2)  # [B, H, 1] -> [B, 1, H]
    strength = torch.where(written[:, None, None], tokens.strength.transpose(1, 2), 0)  # [B, H, 1]
    weight = rule.weight(k @ solution, v, strength) if rule.novelty is not None else strength
    if rule.keep != 1:
        _age(pending, covariance, state["coordinate"], written, rule.keep)
    spread = k @ covariance  # [B, H, 1, m]
    gain = weight / (rule.regularization[:, None] + weight * (spread * k).sum(-1).clamp(min=0))  # [B, H, 1]
    _observe(pending, covariance, spread, gain, v - k @ pending)
    _copy_rows(solution, pending, done)
    if rule.variance:
        _copy_rows(state["covariance_read"], covariance, done)
    position.copy_(following)
    return Read(read.transpose(1, 2), variance)


def _age(solution: Tensor, covariance: Tensor, coordinate: Tensor, written: Tensor, keep: float) -> None:
    """Decay before a written token: what was known over gamma, and the prior back along the row's coordinate."""
    heads, width = covariance.shape[1:3]
    rows = row_mask(written, covariance).to(covariance.dtype)  # [B, 1, 1, 1], zero or one
    covariance.mul_(1 + rows * (1 / keep - 1))
    index = coordinate.view(-1, 1, 1, 1)
    spread = covariance.gather(2, index.expand(-1, heads, 1, width))  # [B, H, 1, m], P e_i
    added = rows[..., 0] * ((1 - keep) * width)  # [B, 1, 1]
    gain = added / (1 + added * spread.gather(3, index.expand(-1, heads, 1, 1))[..., 0].clamp(min=0))  # [B, H, 1]
    known = solution.gather(2, index.expand(-1, heads, 1, solution.shape[-1]))  # [B, H, 1, d], S^T e_i
    _observe(solution, covariance, spread, gain, -known)
    coordinate.copy_((coordinate + written) % width)


def _observe(solution: Tensor, covariance: Tensor, spread: Tensor, gain: Tensor, error: Tensor) -> None:
    """S += c u error^T and P -= c u u^T, in place; ``spread [B, H, 1, m]`` is u, ``gain [B, H, 1]`` c.

    P keeps its symmetry to the last bit, being given one vector's outer product with itself: decay would double what is
    not symmetric, again and again.
    """
    root = spread * gain.sqrt()[..., None]
    _add_outer(solution, root.mT, error * gain.sqrt()[..., None])
    _add_outer(covariance, root.mT, -root)


def _add_outer(matrix: Tensor, column: Tensor, row: Tensor) -> None:
    """``matrix [B, H, m, n] += column [B, H, m, 1] row [B, H, 1, n]``, in place."""
    matrix.flatten(0, 1).baddbmm_(column.flatten(0, 1), row.flatten(0, 1))


def _copy_rows(target: Tensor, source: Tensor, rows: Tensor) -> None:
    """``source`` into ``target``, in place, in rows where ``rows [B]`` is true."""
    torch.where(row_mask(rows, target), source, target, out=target)
