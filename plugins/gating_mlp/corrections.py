"""Updates that correct the memory's answers: one gradient step a chunk, or the chunk's ridge (proximal) step.

With keys K ``[C, h]``, values V and answers O = K D ``[C, d]`` of a chunk, D the accumulated update at its beginning:

- ``gradient``: D <- D + K^T diag(b) (V - O)
- ``ridge``: D <- D + K^T (K K^T + l diag(1 / b))^-1 (V - O)

A stream makes the ridge step token by token. With R = diag(sqrt(b)), K' = R K, E' = R (V - O) and the Cholesky factor
L L^T = K' K'^T + l I, it is D <- D + Q^T Y, where L Q = K' and L Y = E'. A row of Q and of Y needs the rows before it
alone, so each token's are computed when it arrives; the stored keys are Q and the stored values Y, folded like any
others, and no system is left to solve at the chunk's end. b -> 0 is a row of zeros; no pivot of L is below sqrt(l).

A token whose answer is so large that sums might not stay finite counts as one that is not finite: the update of its
chunk is skipped. So a memory that diverges stays finite.

A chunk's answers depend on the updates before it, so both forms of training go chunk by chunk.

Shape legend: B streams, N chunks, C tokens a chunk, d width, h hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moshi_ttt.plugins.common.finite import below, largest_factor
from moshi_ttt.plugins.gating_mlp import chunkwise, ops

RIDGE = 0.3
"""The initial l."""
RIDGE_BOUNDS = (1e-2, 1e3)
"""The bounds of l. A stream's error in float32 grows as C |k'|^2 / l where keys are nearly equal: with 256 equal
keys of norm one it is 1 % of the update at the lower bound, and was 60 % at a tenth of it."""


def ridge_of(log_ridge: Tensor) -> Tensor:
    """l ``[1]`` float64 of the parameter, its logarithm ``[1]``."""
    low, high = RIDGE_BOUNDS
    return log_ridge.double().clamp(math.log(low), math.log(high)).exp()  # before exp: none is infinite


def solved(keys: Tensor, errors: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q ``[B, C, h]``, Y ``[B, C, d]`` and L ``[B, C, C]`` of K' and E', by float64, in the dtype of ``keys``."""
    wide = keys.double()
    diagonal = ridge * torch.eye(keys.shape[1], dtype=torch.float64, device=keys.device)
    factor = torch.linalg.cholesky_ex(wide @ wide.mT + diagonal).L  # without a device synchronization
    both = torch.linalg.solve_triangular(factor, torch.cat([wide, errors.double()], dim=-1), upper=False)
    q, y = both.to(keys.dtype).split([keys.shape[-1], errors.shape[-1]], dim=-1)
    return q, y, factor.to(keys.dtype)


@dataclass
class Unfinished:
    """The chunk that was unfinished before a call.

    Attributes:
        earlier: ``[B, C]`` bool, tokens that were seen; settled: those whose value no later token changes.
        keys, values: ``[B, C, h]`` and ``[B, C, d]``, as they are stored; factor: ``[B, C, C]``, with ``ridge``.
    """

    earlier: Tensor
    settled: Tensor
    keys: Tensor
    values: Tensor
    factor: Tensor | None

    def before_the_solution(self, keys: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """K' and E' of the chunk, for the tokens that were seen, from Q, Y and L.

        ``keys [B, C, h]`` and ``errors [B, C, d]`` have the others'.
        """
        assert self.factor is not None
        factor = self.factor.double()
        known = torch.where(self.earlier[..., None], self.keys, 0).double()
        found = torch.where(self.settled[..., None], self.values, 0).double()
        return (
            torch.where(self.earlier[..., None], (factor @ known).to(keys), keys),
            torch.where(self.settled[..., None], (factor @ found).to(errors), errors),
        )


class CorrectedMemory(Protocol):
    """A memory that is read and written chunk by chunk."""

    def read(self, queries: Tensor) -> Tensor:
        """``[B, C, d]`` for ``queries [B, C, h]``; of size 0 where nothing was written yet."""

    def write(self, keys: Tensor, values: Tensor, ended: Tensor, applied: Tensor) -> None:
        """Update by a chunk's ``keys [B, C, h]`` and ``values [B, C, d]`` where it ``ended [B or 1]``.

        The update counts where it is ``applied [B]``; elsewhere nothing decays either.
        """


class ChunkwiseMemory:
    """The chunkwise form: keeps D."""

    def __init__(self, start: Tensor, decay: float) -> None:
        self.delta, self.decay = start, decay

    def read(self, queries: Tensor) -> Tensor:
        return queries @ self.delta

    def write(self, keys: Tensor, values: Tensor, ended: Tensor, applied: Tensor) -> None:
        self.delta = chunkwise.after_chunk(self.delta, keys, values, ended, applied, self.decay)


class ParallelMemory:
    """The parallel form: without D, each earlier chunk by its products with the queries."""

    def __init__(self, start: Tensor | None, decay: float) -> None:
        self.start, self.decay = start, decay
        self.past: list[tuple[Tensor, Tensor]] = []
        self.made: list[Tensor] = []
        """``[B]``, with decay: the updates made up to the end of each chunk of the past."""

    def read(self, queries: Tensor) -> Tensor:
        parts = []
        if self.start is not None:
            parts.append(self._decayed(queries @ self.start, 0))
        for i, (keys, values) in enumerate(self.past):
            parts.append(self._decayed((queries @ keys.mT) @ values, i + 1))
        if not parts:
            return queries.new_zeros(0)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def write(self, keys: Tensor, values: Tensor, ended: Tensor, applied: Tensor) -> None:
        # A chunk that did not end is its row's last: no token of the row reads its update.
        mask = applied[:, None, None]  # [B] -> [B, 1, 1]
        self.past.append((torch.where(mask, keys, 0), torch.where(mask, values, 0)))
        if self.decay:
            made = applied.to(values.dtype)
            self.made.append(self.made[-1] + made if self.made else made)

    def _decayed(self, part: Tensor, first: int) -> Tensor:
        """``part [B, C, d]`` after the updates of the chunks from ``first`` on."""
        if not self.decay or first == len(self.past):
            return part
        updates = self.made[-1] - self.made[first - 1] if first else self.made[-1]  # [B]
        return torch.pow(1 - self.decay, updates)[:, None, None] * part  # [B, 1, 1] times [B, C, d]


@dataclass
class Corrected:
    """Chunk by chunk, the parts of ``memory.CallChunks``."""

    answers: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    conv_tails: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    num_nonfinite: list[Tensor] = field(default_factory=list)


def corrected(
    memory: CorrectedMemory, queries: Tensor, keys: Sequence[Tensor], sums: Tensor, rate: Tensor, num_nonfinite: Tensor,
    allowed: Tensor | None, complete: Tensor, unfinished: Unfinished | None, ridge: Tensor | None,
    clip: tuple[float, Tensor] | None,
) -> Corrected:  # fmt: skip
    """Read, correct, write, chunk by chunk.

    Args:
        queries: ``[B, N, C, h]``; keys: N times ``[B, C, h]``, with ``ridge`` K'.
        sums: ``[B, N, C + any, d]``, the filter's output, less the answers to the tokens of earlier calls; rate:
            ``[B, N, C + any, 1]``, b, with ``ridge`` its root.
        num_nonfinite, complete: ``[B, N]``.
        allowed: ``[B, N]`` bool, chunks that may make an update; None: all.
        unfinished: the chunk that the first one continues.
        ridge: l, or None for a gradient step.
        clip: the largest norm and the projection ``[d, d]`` float64.
    """
    out, size = Corrected(), queries.shape[2]
    for i, key in enumerate(keys):
        before = unfinished if i == 0 else None
        answer = memory.read(queries[:, i])  # [B, C, d]
        answer = answer if answer.numel() else torch.zeros_like(sums[:, i, :size])
        # [B, C] -> [B, C, 1]: the answers to earlier tokens were subtracted when they were seen
        new = answer if before is None else torch.where(before.earlier[..., None], 0, answer)
        nonfinite = num_nonfinite[:, i] + (~below(new.detach(), largest_factor(new.dtype))).sum(1)  # [B]
        tail = torch.cat([sums[:, i, :size] - new, sums[:, i, size:]], dim=1)  # [B, C + any, d]
        value = tail[:, :size] * rate[:, i, :size]  # [B, C, d] times [B, C, 1]
        if ridge is not None:
            system = (key, value) if before is None else before.before_the_solution(key, value)
            key, value, factor = solved(*system, ridge)
            out.factors.append(factor)
        if before is not None:
            key = torch.where(before.earlier[..., None], before.keys, key)  # [B, C, 1] over [B, C, h]
            value = torch.where(before.settled[..., None], before.values, value)  # [B, C, 1] over [B, C, d]
            if before.factor is not None:
                # [B, C, 1] over [B, C, C]
                out.factors[0] = torch.where(before.earlier[..., None], before.factor, out.factors[0])
        scale = (nonfinite == 0 if allowed is None else (nonfinite == 0) & allowed[:, i]).to(value)  # [B]
        if clip is not None:
            out.squares.append(ops.squared_norm(key, value.double() @ clip[1]))
            scale = scale * ops.clip_scale(out.squares[-1].sum(-1), clip[0]).to(scale)
        if i + 1 < len(keys):
            memory.write(key, value * scale[:, None, None], complete[:, i], scale != 0)  # [B, C, d] times [B, 1, 1]
        for name, part in (
            ("answers", answer), ("keys", key), ("values", value), ("conv_tails", tail), ("scales", scale),
            ("num_nonfinite", nonfinite),
        ):  # fmt: skip
            getattr(out, name).append(part)
    return out
