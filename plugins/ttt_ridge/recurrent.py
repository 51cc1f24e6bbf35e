"""The recurrent form of ``ttt_ridge``: one token of every stream, in place. What streaming runs.

Shape legend: B streams, H heads, m key width, d value width. Everything has the state's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.ttt_ridge.memory import Read, RidgeTokens, Rule


@torch.no_grad()
def recurrent_ridge(
    tokens: RidgeTokens, state: BlockState, rule: Rule, chunk_size: int, exec_mask: Tensor | None = None
) -> Read:
    """One token of every stream; ``state`` is updated in place, without a device synchronization.

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
        following = torch.where(exec_mask, following, position)  # [B]
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
    return Read(read.transpose(1, 2), variance)  # [B, H, 1, d] -> [B, 1, H, d]


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
