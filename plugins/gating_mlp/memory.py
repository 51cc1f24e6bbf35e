"""The state of a stream of ``gating_mlp``, and the state after a call of any length, functionally.

- ``position [B]``: tokens in the unfinished chunk.
- ``delta [B, h + 1, d]``: the accumulated update, transposed, before the projection; its last row is zero. Channels
  below ``schedule.folded(position)`` have the last finished chunk in them, the others not yet.
- ``keys [B, slots, h]``, ``values [B, slots, d]``: the last finished chunk and the unfinished one, as ``schedule`` lays
  them out; the last slot is zero.
- ``open [B, K - 1, d + 1]``, in the code ``conv_tail``: what the unfinished chunk's tokens so far add to the filter's
  output, from R tokens before the next one on, less the memory's answer to each where updates correct it; in the last
  column, the rates.
- ``scale [B]``: what the last finished chunk's update is multiplied by (clipping; 0 where it made none, because it
  was skipped or disabled: then nothing decayed either).
- ``spoiled [B]``, in the code ``num_nonfinite``: tokens of the unfinished chunk that are not finite; with any, its
  update will be skipped.
- ``enabled [B]``, in the code ``num_enabled``: tokens of the unfinished chunk whose updates are enabled; without any,
  it makes no update.
- ``skipped [B]``: updates that were skipped.
- ``factor [B, C, C]``, with ``update: ridge``: the rows so far of the unfinished chunk's Cholesky factor
  (corrections.py); the chunk's keys and values are then Q and Y, and the rates in ``open`` are roots.
- ``answer [B, 1, d]``, ``scores [B, 1, taps - 1]``, with the success gate: see plugins/common/success_gate.py.
- ``norm [B, parts]``, where updates are clipped: norm of the unfinished update, over tokens whose value is settled, in
  parts that add to it (``ops.norm_in_parts``).

The names are those of saved streams, so they stay.

Shape legend: B streams, N chunks, C tokens a chunk, d width, h hidden width, K taps that reach a token of the chunk,
R of them looking ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.core.state_ranges import StateRange
from moshi_ttt.plugins.common.success_gate import TAPS
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.config import Update
from moshi_ttt.plugins.gating_mlp.corrections import Unfinished
from moshi_ttt.plugins.gating_mlp.schedule import FoldSchedule


class StoredTokens(NamedTuple):
    """Keys ``[B, n, h]`` and values ``[B, n, d]`` of the same tokens."""

    keys: Tensor
    values: Tensor

    def where(self, mask: Tensor, other: StoredTokens) -> StoredTokens:
        """These where ``mask``, ``[B]`` or ``[B, n]``, is true, ``other`` elsewhere."""
        mask = mask.view(*mask.shape, *(1 for _ in range(3 - mask.dim())))  # [B, 1, 1] or [B, n, 1]
        return StoredTokens(torch.where(mask, self.keys, other.keys), torch.where(mask, self.values, other.values))

    def first(self, count: int) -> StoredTokens:
        return StoredTokens(self.keys[:, :count], self.values[:, :count])


@dataclass(frozen=True, kw_only=True)
class CallChunks:
    """A call's tokens by chunks; the first chunk continues the one that was unfinished before the call.

    Attributes:
        keys: N times ``[B, C, h]``; zero where there is no token, one that is not finite, or one that updates nothing.
        values: ``[B, N, C, d]``; zero where there is no token or one that is not finite.
        conv_tail: ``[B, N, C + K, d + 1]``, the filter's output and the rates, also past the chunk's end; less the
            memory's answers where updates correct it.
        complete: ``[B, N]`` bool, chunks that end in this call.
        num_nonfinite, num_enabled: ``[B, N]`` int64, tokens that are not finite, and those whose updates are enabled.
            The latter is None where the state is not wanted.
        allowed: ``[B, N]`` bool, chunks with an enabled token; None: all that end.
        scale: ``[B, N]``, zero where no update is made.
        squares: ``[B, N, C]`` float64, what each token adds to its update's squared norm, or None without clipping.
        seen: ``[B]`` int64, tokens since the start of the first chunk.
        factors: N times ``[B, C, C]``, with ``update: ridge``.
    """

    keys: Sequence[Tensor]
    values: Tensor
    conv_tail: Tensor
    complete: Tensor
    num_nonfinite: Tensor
    num_enabled: Tensor | None
    allowed: Tensor | None
    scale: Tensor
    squares: Tensor | None
    seen: Tensor
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

    def flops_per_token(self) -> int:
        """Floating-point operations of a streamed token: reading, folding, the filter, and what the options add."""
        width, schedule = self.width, self.schedule
        hidden, window = schedule.hidden, 1 + schedule.look_ahead
        read = hidden * width + schedule.chunk * (hidden + width) + width * width
        fold, value = schedule.slice * schedule.chunk * width, window * self.taps * width
        clip = solve = 0
        if self.clip is not None:
            clip = window * (schedule.chunk * (hidden + width) + width * width)
        if self.update_rule == "ridge":  # a row of Q, and of Y for each token whose value is not settled
            solve = schedule.chunk * (2 * hidden + window * width)
        return 2 * (read + fold + value + clip + solve)

    def initial(self, batch: int, dtype: torch.dtype, device: torch.device) -> BlockState:
        """The state at a stream's start."""
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

    def ranges(self) -> dict[str, StateRange]:
        """Of the state's whole numbers."""
        last = self.schedule.chunk - 1
        tokens = {name: StateRange(most=last, up_to="position") for name in ("spoiled", "enabled")}
        return {"position": StateRange(most=last), **tokens, "skipped": StateRange()}

    def update(self, state: BlockState) -> Tensor:
        """``[B, h, d]``: the accumulated update of all finished chunks, transposed, before the projection."""
        start = self.schedule.folded(state["position"])
        delta = state["delta"][:, :-1]
        if not torch.is_grad_enabled():
            delta = delta.clone(memory_format=torch.contiguous_format)
        return self._fold(delta, self._finished(state), state["scale"], start, self.schedule.hidden)

    def unfinished(self, state: BlockState) -> Unfinished:
        """The C tokens of the unfinished chunk; those from its position on mean nothing."""
        size, staged = self.schedule.chunk, self.schedule.staged

        def found(tokens: Tensor) -> Tensor:
            # [B, slots, any] -> [B, C, any]: the first S are staged, the others in place
            return torch.cat([tokens[:, size : size + staged], tokens[:, staged:size]], dim=1)

        seen, token = state["position"][:, None], torch.arange(size, device=state["position"].device)
        return Unfinished(
            earlier=token < seen, settled=token < seen - self.schedule.look_ahead, keys=found(state["keys"]),
            values=found(state["values"]), factor=state.get("factor"),
        )  # fmt: skip

    def conv_tail(self, state: BlockState) -> Tensor:
        """``state["open"]`` at the tokens that it belongs to: ``[B, C + K, d + 1]``, zero elsewhere."""
        token = torch.arange(self.schedule.chunk + self.taps, device=state["open"].device)
        index = token - (state["position"] - self.schedule.look_ahead)[:, None]  # [C + K] and [B, 1] -> [B, C + K]
        index = torch.where((index >= 0) & (index < self.taps - 1), index, self.taps - 1)
        return F.pad(state["open"], (0, 0, 0, 1)).gather(1, index[..., None].expand(-1, -1, self.width + 1))

    def after(self, before: BlockState, call: CallChunks) -> BlockState:
        """The state after a call that continued ``before``."""
        assert call.num_enabled is not None
        schedule, size = self.schedule, self.schedule.chunk
        ended, position = call.seen // size, call.seen % size
        # Without gradients ``_fold`` changes delta in place: here the rows that the state after the call will have.
        whole = (
            before["delta"] if torch.is_grad_enabled() else before["delta"].clone(memory_format=torch.contiguous_format)
        )
        # delta [B, h, d] of [B, h + 1, d]; the others [B]
        delta, scale, folded = whole[:, :-1], before["scale"], schedule.folded(before["position"])
        last = self._finished(before)
        staged = StoredTokens(before["keys"][:, size:-1], before["values"][:, size:-1])  # [B, S, h] and [B, S, d]
        current = StoredTokens(*map(torch.zeros_like, last))
        for i, chunk in enumerate(map(StoredTokens, call.keys, call.values.unbind(1))):  # [B, C, h] and [B, C, d]
            done = call.complete[:, i]  # [B]
            # Where the chunk has not ended there is nothing to fold: no channel from its first to its first.
            delta = self._fold(delta, last, scale, folded, torch.where(done, schedule.hidden, folded))  # [B] -> [B]
            folded, scale = torch.where(done, 0, folded), torch.where(done, call.scale[:, i], scale)  # each [B]
            last = chunk.where(done, last)  # [B] over [B, C, any]
            staged = chunk.first(schedule.staged).where(done, staged)  # [B] over [B, S, any]
            current = chunk.where(ended == i, current)  # [B] over [B, C, any]
        delta = self._fold(delta, last, scale, folded, schedule.folded(position))
        seen = torch.arange(schedule.staged, device=position.device) < position[:, None]  # [S] and [B, 1] -> [B, S]
        skipped = call.complete & (call.scale == 0)  # [B, N]
        skipped = skipped if call.allowed is None else skipped & call.allowed
        place = current.where(schedule.in_place(position), last)  # [B, C] over [B, C, any]
        staged = current.first(schedule.staged).where(seen, staged)  # [B, S] over [B, S, any]
        # slots: C in place, S staged, one that is zero: [B, C + S + 1, any]; delta [B, h, d] -> [B, h + 1, d]
        state = {
            "position": position,
            "delta": F.pad(delta, (0, 0, 0, 1)) if torch.is_grad_enabled() else whole,
            "keys": torch.cat([place.keys, staged.keys, before["keys"][:, -1:]], dim=1),
            "values": torch.cat([place.values, staged.values, before["values"][:, -1:]], dim=1),
            "open": self._tail(_of_chunk(call.conv_tail, ended), position),
            "scale": scale,
            "spoiled": _of_chunk(call.num_nonfinite, ended),
            "enabled": _of_chunk(call.num_enabled, ended),
            "skipped": before["skipped"] + skipped.sum(1),
        }
        if call.factors:
            rows = torch.arange(size, device=position.device) < position[:, None]  # [C] and [B, 1] -> [B, C]
            factor = _of_chunk(torch.stack(list(call.factors), dim=1), ended)  # [B, N, C, C] -> [B, C, C]
            state["factor"] = torch.where(rows[..., None], factor, 0)  # [B, C, 1] over [B, C, C]
        if call.squares is None:
            return state
        settled = torch.arange(size, device=position.device) < (position - schedule.look_ahead)[:, None]  # [B, C]
        square = torch.where(settled, _of_chunk(call.squares, ended), 0).sum(1)  # [B, N, C] -> [B, C] -> [B]
        return {**state, "norm": ops.norm_in_parts(square, before["norm"].dtype)}

    def _finished(self, state: BlockState) -> StoredTokens:
        size = self.schedule.chunk
        return StoredTokens(state["keys"][:, :size], state["values"][:, :size])

    def _fold(self, delta: Tensor, chunk: StoredTokens, scale: Tensor, start: Tensor, end: Tensor | int) -> Tensor:
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

    def _tail(self, sums: Tensor, position: Tensor) -> Tensor:
        """``[B, K - 1, d + 1]`` of ``sums [B, C + K, d + 1]``, from R tokens before ``position [B]`` on."""
        # [K - 1] and [B, 1] -> [B, K - 1]
        token = torch.arange(self.taps - 1, device=position.device) + (position - self.schedule.look_ahead)[:, None]
        found = sums.gather(1, token.clamp(min=0)[..., None].expand(-1, -1, sums.shape[-1]))
        return torch.where((token >= 0)[..., None], found, 0)


def upgraded(state: Mapping[str, Tensor]) -> BlockState:
    """``state`` with ``enabled``, which earlier versions did not save.

    The tokens of a chunk that was unfinished are taken to have had updates enabled, as those versions took them.
    """
    if "enabled" in state or "position" not in state:
        return dict(state)
    return {**state, "enabled": state["position"].clone()}


def _of_chunk(parts: Tensor, index: Tensor) -> Tensor:
    """``parts[b, index[b]]`` of ``parts [B, N, ...]``; zero where ``index [B]`` is N."""
    padded = torch.cat([parts, torch.zeros_like(parts[:, :1])], dim=1)  # [B, N + 1, ...]
    return padded.gather(1, row_mask(index, parts).expand(-1, 1, *parts.shape[2:])).squeeze(1)
