"""The memory of ``ttt_ridge``: the regularized least-squares solution over the earlier tokens of a stream.

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

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState
from moshi_ttt.core.state_ranges import StateRange
from moshi_ttt.plugins.common.success_gate import similarity


class RidgeTokens(NamedTuple):
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
        return strength * torch.sigmoid(offset - slope * similarity(read, value))


# ---- state: the solution that is read, the one with the unfinished chunk's tokens too, the covariance of the latter


def initial_state(
    batch: int, heads: int, key: int, value: int, like: Tensor, *, decays: bool, variance: bool
) -> BlockState:
    """The state before any token: solutions of zero and covariances I, in the dtype and on the device of ``like``.

    Counted are tokens of the unfinished chunk, tokens left out as not finite, and, where the memory ``decays``, the
    coordinate that gets its prior back next. With ``variance`` the covariance at the chunk's start is kept too.
    """
    zeros = like.new_zeros(1, heads, key, value).expand(batch, -1, -1, -1)
    identity = torch.eye(key, dtype=like.dtype, device=like.device).expand(batch, heads, -1, -1)
    counters = ("position", "skipped", "coordinate") if decays else ("position", "skipped")
    state: BlockState = {name: torch.zeros(batch, dtype=torch.int64, device=like.device) for name in counters}
    state |= {"solution": zeros, "pending": zeros, "covariance": identity}
    return {**state, "covariance_read": identity} if variance else state


def state_ranges(chunk: int, key: int, *, decays: bool) -> dict[str, StateRange]:
    """The whole numbers of a state, for chunks of ``chunk`` tokens and keys of width ``key``."""
    ranges = {"position": StateRange(most=chunk - 1), "skipped": StateRange()}
    return {**ranges, "coordinate": StateRange(most=key - 1)} if decays else ranges
