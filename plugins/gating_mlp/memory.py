"""What a stream of ``gating_mlp`` carries, and how a call of any length continues it, functionally.

- ``position [B]``: tokens in the unfinished chunk.
- ``delta [B, h + 1, d]``: the accumulated update, transposed, before the projection; its last row is zero. Channels
  below ``schedule.folded(position)`` have the last finished chunk in them, the others not yet.
- ``keys [B, slots, h]``, ``values [B, slots, d]``: the last finished chunk and the unfinished one, as ``schedule`` lays
  them out; the last slot is zero.
- ``open [B, K - 1, d + 1]``: what the unfinished chunk's tokens so far add to the filter's output, at the tokens from
  R before the next one on, less the memory's answer to each where updates correct it; in the last column, the rates.
- ``scale [B]``: what the last finished chunk's update is multiplied by (clipping; 0 where it made none, because it was
  skipped or disabled: then nothing decayed either).
- ``spoiled [B]``: tokens of the unfinished chunk because of which its update will be skipped.
- ``enabled [B]``: tokens of the unfinished chunk whose updates are enabled; without any, none is made.
- ``skipped [B]``: updates that were skipped.
- ``factor [B, C, C]``, with ``update: ridge``: the rows so far of the unfinished chunk's Cholesky factor
  (corrections.py); the chunk's keys and values are then Q and Y, and the rates in ``open`` are roots.
- ``answer [B, 1, d]``, ``scores [B, 1, taps - 1]``, with the success gate: see plugins/gating_mlp/success_gate.py.
- ``norm [B, parts]``, where updates are clipped: norm of the unfinished update, over tokens whose value is settled, in
  parts that add to it (``ops.norm_in_parts``).

Shape legend: B streams, N chunks, C tokens a chunk, d width, h hidden width, K taps that reach a token of the chunk,
R of them looking ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.common.success_gate import TAPS
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.config import Update
from moshi_ttt.plugins.gating_mlp.corrections import Unfinished
from moshi_ttt.plugins.gating_mlp.schedule import FoldSchedule


class Tokens(NamedTuple):
    """Keys ``[B, n, h]`` and values ``[B, n, d]`` of the same tokens."""

    keys: Tensor
    values: Tensor

    def where(self, mask: Tensor, other: Tokens) -> Tokens:
        """These where ``mask``, ``[B]`` or ``[B, n]``, is true, ``other`` elsewhere."""
        mask = mask.view(*mask.shape, *(1 for _ in range(3 - mask.dim())))
        return Tokens(torch.where(mask, self.keys, other.keys), torch.where(mask, self.values, other.values))

    def first(self, count: int) -> Tokens:
        return Tokens(self.keys[:, :count], self.values[:, :count])


@dataclass(frozen=True, kw_only=True)
class HeardChunks:
    """A call's tokens by chunks; the first goes on with the chunk that was unfinished before it.

    Attributes:
        keys: N times ``[B, C, h]``; zero where there is no token, one that is not finite, or one that updates nothing.
        values: ``[B, N, C, d]``; zero where there is no token or one that is not finite.
        open: ``[B, N, C + K, d + 1]``, the filter's output and the rates, also past the chunk's end; less the memory's
            answers where updates correct it.
        complete: ``[B, N]`` bool, chunks that end in this call.
        spoiled, enabled: ``[B, N]`` int64, tokens that are not finite, and those whose updates are enabled; the latter
            None where nobody wants the state.
        allowed: ``[B, N]`` bool, chunks with such a token; None: all that end.
        scale: ``[B, N]``, zero where no update is made.
        squares: ``[B, N, C]`` float64, what each token adds to its update's squared norm, or None without clipping.
        come: ``[B]`` int64, tokens since the start of the first chunk.
        factors: N times ``[B, C, C]``, with ``update: ridge``.
    """

    keys: Sequence[Tensor]
    values: Tensor
    open: Tensor
    complete: Tensor
    spoiled: Tensor
    enabled: Tensor | None = None
    allowed: Tensor | None
    scale: Tensor
    squares: Tensor | None
    come: Tensor
    factors: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Memory:
    """The layout of one block's state.

    Attributes:
        kernel: taps of the filter; those from ``first_tap`` on, K of them, can reach another token of the same chunk.
        left: how many of those look back; the schedule has how many look ahead.
    """

    schedule: FoldSchedule
    width: int
    kernel: int
    first_tap: int
    left: int
    decay: float = 0.0
    clip: float | None = None
    update_rule: Update = "hebbian"
    gated: bool = False

    @classmethod
    def planned(
        cls, *, chunk: int, hidden: int, width: int, kernel: int, padding: str, decay: float = 0.0,
        clip: float | None = None, update: Update = "hebbian", gated: bool = False,
    ) -> Memory:  # fmt: skip
        """The memory for a filter of ``kernel`` taps, ``centered`` or ``causal``, without those no token can reach."""
        left = ops.left_padding(kernel, padding)
        back, ahead = min(left, chunk - 1), min(kernel - 1 - left, chunk - 1)
        return cls(FoldSchedule(chunk, hidden, ahead), width, kernel, left - back, back, decay, clip, update, gated)

    @property
    def taps(self) -> int:
        return self.left + self.schedule.look_ahead + 1

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> BlockState:
        """A stream that has heard nothing."""
        schedule = self.schedule

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        state = {name: zeros().long() for name in ("position", "spoiled", "enabled", "skipped")} | {
            "delta": zeros(schedule.hidden + 1, self.width),
            "keys": zeros(schedule.slots, schedule.hidden),
            "values": zeros(schedule.slots, self.width),
            "open": zeros(self.taps - 1, self.width + 1),
            "scale": zeros(),
        }
        if self.update_rule == "ridge":
            state["factor"] = zeros(schedule.chunk, schedule.chunk)
        if self.gated:
            state |= {"answer": zeros(1, self.width), "scores": zeros(1, TAPS - 1)}
        return state if self.clip is None else {**state, "norm": zeros(ops.num_parts(dtype))}

    def update(self, state: BlockState) -> Tensor:
        """``[B, h, d]``: the accumulated update of all finished chunks, transposed, before the projection."""
        start = self.schedule.folded(state["position"])
        delta = state["delta"][:, :-1]
        if not torch.is_grad_enabled():
            delta = delta.clone(memory_format=torch.contiguous_format)
        return self._fold(delta, self._finished(state), state["scale"], start, self.schedule.hidden)

    def unfinished(self, state: BlockState) -> Unfinished:
        """The C tokens of the unfinished chunk; beyond its position they mean nothing."""
        size, staged = self.schedule.chunk, self.schedule.staged

        def found(tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, size : size + staged], tokens[:, staged:size]], dim=1)

        come, token = state["position"][:, None], torch.arange(size, device=state["position"].device)
        return Unfinished(
            earlier=token < come, settled=token < come - self.schedule.look_ahead, keys=found(state["keys"]),
            values=found(state["values"]), factor=state.get("factor"),
        )  # fmt: skip

    def open_tokens(self, state: BlockState) -> Tensor:
        """``state["open"]`` at the tokens it is about: ``[B, C + K, d + 1]``, zero elsewhere."""
        token = torch.arange(self.schedule.chunk + self.taps, device=state["open"].device)
        index = token - (state["position"] - self.schedule.look_ahead)[:, None]
        index = torch.where((index >= 0) & (index < self.taps - 1), index, self.taps - 1)
        return F.pad(state["open"], (0, 0, 0, 1)).gather(1, index[..., None].expand(-1, -1, self.width + 1))

    def after(self, before: BlockState, heard: HeardChunks) -> BlockState:
        """The state after a call that continued ``before``."""
        assert heard.enabled is not None
        schedule, size = self.schedule, self.schedule.chunk
        ended, position = heard.come // size, heard.come % size
        # Without gradients ``_fold`` changes delta in place: here the rows that the state after the call will have.
        whole = (
            before["delta"] if torch.is_grad_enabled() else before["delta"].clone(memory_format=torch.contiguous_format)
        )
        delta, scale, folded = whole[:, :-1], before["scale"], schedule.folded(before["position"])
        last = self._finished(before)
        staged = Tokens(before["keys"][:, size:-1], before["values"][:, size:-1])
        current = Tokens(*map(torch.zeros_like, last))
        for i, chunk in enumerate(map(Tokens, heard.keys, heard.values.unbind(1))):
            done = heard.complete[:, i]
            # Where the chunk has not ended there is nothing to fold: no channel from its first to its first.
            delta = self._fold(delta, last, scale, folded, torch.where(done, schedule.hidden, folded))
            folded, scale = torch.where(done, 0, folded), torch.where(done, heard.scale[:, i], scale)
            last = chunk.where(done, last)
            staged = chunk.first(schedule.staged).where(done, staged)
            current = chunk.where(ended == i, current)
        delta = self._fold(delta, last, scale, folded, schedule.folded(position))
        come = torch.arange(schedule.staged, device=position.device) < position[:, None]
        skipped = heard.complete & (heard.scale == 0)
        skipped = skipped if heard.allowed is None else skipped & heard.allowed
        place = current.where(schedule.in_place(position), last)
        staged = current.first(schedule.staged).where(come, staged)
        state = {
            "position": position,
            "delta": F.pad(delta, (0, 0, 0, 1)) if torch.is_grad_enabled() else whole,
            "keys": torch.cat([place.keys, staged.keys, before["keys"][:, -1:]], dim=1),
            "values": torch.cat([place.values, staged.values, before["values"][:, -1:]], dim=1),
            "open": self._open(_of_chunk(heard.open, ended), position),
            "scale": scale,
            "spoiled": _of_chunk(heard.spoiled, ended),
            "enabled": _of_chunk(heard.enabled, ended),
            "skipped": before["skipped"] + skipped.sum(1),
        }
        if heard.factors:
            rows = torch.arange(size, device=position.device) < position[:, None]
            factor = _of_chunk(torch.stack(list(heard.factors), dim=1), ended)
            state["factor"] = torch.where(rows[..., None], factor, 0)
        if heard.squares is None:
            return state
        settled = torch.arange(size, device=position.device) < (position - schedule.look_ahead)[:, None]
        square = torch.where(settled, _of_chunk(heard.squares, ended), 0).sum(1)
        return {**state, "norm": ops.norm_in_parts(square, before["norm"].dtype)}

    def _finished(self, state: BlockState) -> Tokens:
        size = self.schedule.chunk
        return Tokens(state["keys"][:, :size], state["values"][:, :size])

    def _fold(self, delta: Tensor, chunk: Tokens, scale: Tensor, start: Tensor, end: Tensor | int) -> Tensor:
        """``delta [B, h, d]`` with a finished chunk in it, in the channels from ``start [B]`` to ``end [B]``.

        Without gradients ``delta`` itself is changed: it is the largest tensor of a stream, and is never there twice.
        """
        channel = torch.arange(self.schedule.hidden, device=delta.device)
        inside = (channel >= start[:, None]) & (channel < (end if isinstance(end, int) else end[:, None]))  # [B, h]
        values = chunk.values * row_mask(scale, chunk.values)
        kept: float | Tensor = 1.0
        if self.decay:
            kept = 1 - self.decay * (inside & (scale != 0)[:, None]).to(delta)[..., None]  # [B, h, 1]
        if torch.is_grad_enabled():
            return torch.where(inside[..., None], kept * delta + chunk.keys.mT @ values, delta)
        if self.decay:
            delta.mul_(kept)
        return delta.baddbmm_(torch.where(inside[:, None], chunk.keys, 0).mT, values)

    def _open(self, sums: Tensor, position: Tensor) -> Tensor:
        token = torch.arange(self.taps - 1, device=position.device) + (position - self.schedule.look_ahead)[:, None]
        found = sums.gather(1, token.clamp(min=0)[..., None].expand(-1, -1, sums.shape[-1]))
        return torch.where((token >= 0)[..., None], found, 0)


def _of_chunk(parts: Tensor, index: Tensor) -> Tensor:
    """``parts[b, index[b]]`` of ``parts [B, N, ...]``; zero where ``index [B]`` is N."""
    padded = torch.cat([parts, torch.zeros_like(parts[:, :1])], dim=1)
    return padded.gather(1, row_mask(index, parts).expand(-1, 1, *parts.shape[2:])).squeeze(1)
