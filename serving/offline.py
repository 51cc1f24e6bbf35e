"""Recordings as callers: each is a stream of its own in the rows of ``Slots``, as a caller of the server is.

A recording gets a row as soon as one is free and leaves it at its end. What it hears, and when, does not depend on the
others: a row is independent of the rest.

Shape legend: S samples, T frames, K codebooks Moshi speaks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SiteStats, SlotOutput, Slots, SlotSettings


@dataclass(frozen=True, kw_only=True)
class OfflineCaller:
    """One recording that speaks to Moshi.

    Attributes:
        name: what messages and results call it.
        read: its samples ``[S]``, float32 at the slots' rate; called when a row is free.
        settings: of its row.
        memory: what its row begins with; None is the learned start.
    """

    name: str
    read: Callable[[], Tensor]
    settings: SlotSettings
    memory: RowState | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one recording got.

    Attributes:
        user: ``[S]`` float32, what it said, with silence up to a whole number of frames.
        moshi: ``[S]`` float32, what Moshi said at the same time: sample by sample beside ``user``.
        tokens: ``[1 + K, T]`` int64, Moshi's text and audio tokens of each frame.
        stats: (frame, the blocks' figures after so many frames), as often as was asked for.
        memory: of its row after its last frame; None unless it was asked for.
    """

    caller: OfflineCaller
    user: Tensor
    moshi: Tensor
    tokens: Tensor
    stats: list[tuple[int, list[SiteStats]]]
    memory: RowState | None

    @property
    def frames(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """A recording that could not be read, and why."""

    caller: OfflineCaller
    error: Exception


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What is kept beside the answers.

    Attributes:
        stats_every: frames between two looks at the blocks' figures; None for none.
        keep_memory: whether each answer has the memory of its row.
    """

    stats_every: int | None = None
    keep_memory: bool = False


Heard = Callable[[OfflineCaller, SlotOutput | None], None]
"""Called after each frame of a caller with what came out, None where nothing did yet."""


def answer(
    slots: Slots,
    callers: Iterable[OfflineCaller],
    options: AnswerOptions | None = None,
    *,
    on_frame: Heard = lambda caller, output: None,
) -> Iterator[Answer | Unanswered]:
    """Answer ``callers``, as many at a time as there are slots; each answer comes when its recording ends.

    A caller whose ``read`` raises OSError or an error of this package is Unanswered, and the others go on. Every other
    error ends all. The rows are free afterwards, also where the iteration is left early. Raises HostError for a memory
    that does not fit the model.
    """
    options = options or AnswerOptions()
    waiting, talks = deque(callers), dict[int, _Talk]()
    try:
        while waiting or talks:
            for row in range(slots.count):
                while row not in talks and waiting:
                    caller = waiting.popleft()
                    try:
                        samples = caller.read()
                    except (MoshiTTTError, OSError) as error:
                        yield Unanswered(caller=caller, error=error)
                        continue
                    slots.join(row, caller.settings, caller.memory)
                    talks[row] = _Talk(caller, samples, slots.frame_size)
            outputs = slots.tick({row: talk.next_frame() for row, talk in talks.items()}) if talks else {}
            for row, output in outputs.items():
                talk = talks[row]
                talk.take(output)
                _look(slots, row, talk, options)
                on_frame(talk.caller, output)
                if talk.complete:
                    del talks[row]
                    slots.leave(row)
                    yield talk.answer()
    finally:
        for row in talks:
            slots.leave(row)


def _look(slots: Slots, row: int, talk: _Talk, options: AnswerOptions) -> None:
    """Keep the figures and the memory of a row, where they are due: of the recording, not of the silence after it."""
    if talk.heard > talk.frames:
        return
    if options.stats_every and (talk.heard % options.stats_every == 0 or talk.heard == talk.frames):
        talk.stats.append((talk.heard, slots.stats(row)))
    if options.keep_memory and talk.heard == talk.frames:
        talk.memory = slots.save_row(row, "memory")


@dataclass
class _Talk:
    """A caller in a row. Where a model's delay makes the answers late, silence follows until all of them are there."""

    caller: OfflineCaller
    samples: Tensor
    frame_size: int
    heard: int = 0
    tokens: list[Tensor] = field(default_factory=list)
    spoken: list[Tensor] = field(default_factory=list)
    stats: list[tuple[int, list[SiteStats]]] = field(default_factory=list)
    memory: RowState | None = None

    def __post_init__(self) -> None:
        self.samples = F.pad(self.samples, (0, -self.samples.numel() % self.frame_size))

    @property
    def frames(self) -> int:
        return self.samples.numel() // self.frame_size

    def next_frame(self) -> Tensor:
        """``[frame_size]``, the next of the recording, or silence beyond its end."""
        start = self.heard * self.frame_size
        self.heard += 1
        if self.heard > self.frames:
            return self.samples.new_zeros(self.frame_size)
        return self.samples[start : start + self.frame_size]

    def take(self, output: SlotOutput | None) -> None:
        if output is not None:
            self.tokens.append(output.tokens)
            self.spoken.append(output.pcm)

    @property
    def complete(self) -> bool:
        return len(self.tokens) == self.frames

    def answer(self) -> Answer:
        return Answer(
            caller=self.caller, user=self.samples, moshi=torch.cat(self.spoken),
            tokens=torch.stack(self.tokens, dim=1),  # T of [1 + K] to [1 + K, T]
            stats=self.stats, memory=self.memory,
        )  # fmt: skip
