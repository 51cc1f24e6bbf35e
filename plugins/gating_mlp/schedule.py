"""When a stream folds a finished chunk into its fast weight, and where the chunk's tokens are stored until then.

A finished chunk takes effect at the next token, so it is used as it is, factored (keys and values), and folded into the
dense update over the next chunk's first steps, w channels of the hidden activation a step, so that none waits for a
chunk's end. While it lies in place, the first S tokens of the new chunk wait in a staging area; from step S on the old
chunk is folded and its place is free: new tokens go straight there, and the waiting ones move over, m a step.

A filter that looks ahead changes a token's value until R more tokens were seen; only settled tokens move.

Shape legend: C tokens a chunk, h hidden width, R tokens of look-ahead, S staged tokens, w channels folded a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FoldSchedule:
    """The steps of one chunk. Slots: C in place, then S staged, then one that is written to and never read."""

    chunk: int
    hidden: int
    look_ahead: int

    @cached_property
    def staged(self) -> int:
        """S: a quarter of the chunk, or as many as can move over in time.

        More would spread the folding over more steps; fewer steps with an old chunk to read, and less to keep, is worth
        more.
        """
        for staged in range(self.chunk // 4, 0, -1):
            moves = -(-staged // (self.chunk - staged))
            steps = range(staged, self.chunk)
            if all(min(staged, (step - staged + 1) * moves) <= step - self.look_ahead for step in steps):
                return staged
        return 0

    @property
    def moves(self) -> int:
        """m: staged tokens that move over in one step."""
        return -(-self.staged // (self.chunk - self.staged))

    @property
    def slice(self) -> int:
        """w: channels folded in one step; steps 0 to S fold, before the step's token is written."""
        return -(-self.hidden // (self.staged + 1))

    @property
    def slots(self) -> int:
        return self.chunk + self.staged + 1

    def folded(self, position: Tensor) -> Tensor:
        """Channels that are folded when ``position [B]`` tokens of the new chunk were seen."""
        return (position * self.slice).clamp(max=self.hidden)

    def in_place(self, position: Tensor) -> Tensor:
        """``[B, C]`` bool: which tokens of the new chunk lie in place when ``position [B]`` of them were seen."""
        token, seen = torch.arange(self.chunk, device=position.device), position[:, None]  # [C] and [B, 1]
        moved = (seen - self.staged).clamp(min=0) * self.moves
        return (token < seen) & ((token >= self.staged) | (token < moved))


class StepTables:
    """Index tensors of each step: one row per position in the chunk, and as many again for a step that does nothing.

    Per row ``[w columns, w channels, m sources, m + 1 key targets, m + R + 1 value targets, folded, done, next]``. The
    slice to fold is ``columns`` of the keys into ``channels`` of the update; where there is nothing to fold, the
    channel is the one past the last, which is cleared again. Tokens move from ``sources`` to the first m targets; the
    other targets are where the step's key goes, and the values it settles or changes. Channels, sources and targets
    are counted over all rows of the batch. ``done`` is 1 at a chunk's last step, ``next`` the position after the step.
    """

    def __init__(self, schedule: FoldSchedule, batch: int, device: torch.device) -> None:
        window = schedule.look_ahead + 1
        moves = schedule.moves
        self._widths = [schedule.slice, schedule.slice, moves, moves + 1, moves + window, 1, 1, 1]
        steps = range(schedule.chunk)
        table = [_step(schedule, step) for step in steps] + [_idle(schedule, step) for step in steps]
        rows = [0, schedule.hidden + 1, schedule.slots, schedule.slots, schedule.slots, 0, 0, 0]
        strides = [count for count, width in zip(rows, self._widths, strict=True) for _ in range(width)]
        self._table = torch.tensor(table, device=device)
        self._offsets = torch.arange(batch, device=device)[:, None] * torch.tensor(strides, device=device)
        self._idle = schedule.chunk

    def at(self, position: Tensor, active: Tensor | None) -> tuple[Tensor, ...]:
        """The parts for ``position [B]``, each ``[B, width]``; a row that is not ``active [B]`` does nothing."""
        if active is not None:
            position = torch.add(position, ~active, alpha=self._idle)
        found = self._table.index_select(0, position).add_(self._offsets)
        return found.split_with_sizes(self._widths, dim=1)


def _step(schedule: FoldSchedule, step: int) -> list[int]:
    size, staged, hidden, unread = schedule.chunk, schedule.staged, schedule.hidden, schedule.slots - 1
    folded = min(hidden, step * schedule.slice)
    channels = range(folded, folded + schedule.slice)
    before, after = (min(staged, max(0, steps - staged) * schedule.moves) for steps in (step, step + 1))
    slots = [
        unread if token < 0 else token if token >= staged or token < after else size + token
        for token in range(step - schedule.look_ahead, step + 1)
    ]
    moving = [token if token < after else None for token in range(before, before + schedule.moves)]
    return [
        *(min(channel, hidden - 1) for channel in channels),
        *(min(channel, hidden) for channel in channels),
        *(unread if token is None else size + token for token in moving),
        *(moved := [unread if token is None else token for token in moving]),
        slots[-1],
        *moved,
        *slots,
        folded,
        int(step == size - 1),
        (step + 1) % size,
    ]


def _idle(schedule: FoldSchedule, step: int) -> list[int]:
    unread, count = schedule.slots - 1, schedule.look_ahead + 2 + 3 * schedule.moves
    nothing = [0] * schedule.slice + [schedule.hidden] * schedule.slice + [unread] * count
    return [*nothing, min(schedule.hidden, step * schedule.slice), 0, step]
