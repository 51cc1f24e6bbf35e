"""Recordings as callers of the slots: who is in which row, what is heard, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.data.audio_files import AudioError
from moshi_ttt.hosts.moshi.slots import SlotOutput, SlotSettings
from moshi_ttt.serving.offline import Answer, AnswerOptions, OfflineCaller, Unanswered, answer

SIZE = 4
"""Samples of a frame."""


@dataclass
class EchoSlots:
    """Says every frame back, ``late`` frames later, and writes down what it is told. Its memory is what it heard."""

    count: int = 2
    late: int = 0
    fails_at: int | None = None
    frame_size: int = SIZE
    log: list[str] = field(default_factory=list)
    heard: dict[int, list[Tensor]] = field(default_factory=dict)
    ticks: int = 0

    def join(self, row: int, settings: SlotSettings, state: object = None) -> None:
        assert row not in self.heard, "the row was not left"
        self.heard[row] = []
        self.log.append(f"join {row} seed {settings.seed} with {state}")

    def leave(self, row: int) -> None:
        del self.heard[row]
        self.log.append(f"leave {row}")

    def tick(self, frames: dict[int, Tensor]) -> dict[int, SlotOutput | None]:
        assert frames
        assert frames.keys() == self.heard.keys(), "a row was left out"
        if self.ticks == self.fails_at:
            raise RuntimeError("engine")
        self.ticks += 1
        for row, frame in frames.items():
            assert frame.shape == (SIZE,)
            self.heard[row].append(frame)
        return {row: self.say(row) for row in frames}

    def say(self, row: int) -> SlotOutput | None:
        place = len(self.heard[row]) - 1 - self.late
        if place < 0:
            return None
        return SlotOutput(tokens=torch.tensor([place, row]), pcm=self.heard[row][place])

    def save_row(self, row: int, kind: str) -> str:
        return f"{kind} of {len(self.heard[row])} frames"

    def stats(self, row: int) -> list[str]:
        return [f"{len(self.heard[row])}"]


def caller(name: str, samples: int, **more) -> OfflineCaller:
    sound = torch.arange(1, samples + 1, dtype=torch.float32)
    return OfflineCaller(name=name, read=lambda: sound, settings=SlotSettings(seed=samples), **more)


def unreadable(name: str, error: Exception) -> OfflineCaller:
    def read() -> Tensor:
        raise error

    return OfflineCaller(name=name, read=read, settings=SlotSettings())


@pytest.mark.parametrize("late", [0, 3])
def test_an_answer_lies_beside_its_recording_whatever_the_models_delay(late):
    slots = EchoSlots(late=late)
    found = list(answer(slots, [caller("a", 10), caller("b", 4)]))
    assert [each.caller.name for each in found] == ["b", "a"]
    for each, frames in zip(found, (1, 3), strict=True):
        assert isinstance(each, Answer)
        assert torch.equal(each.moshi, each.user)
        assert (each.frames, each.user.numel()) == (frames, frames * SIZE)
        assert each.tokens[0].tolist() == list(range(frames))
    assert found[1].user.tolist() == [*range(1, 11), 0, 0]
    assert slots.heard == {}


def test_rows_are_filled_as_they_come_free_in_the_order_of_the_callers():
    slots = EchoSlots(count=2)
    callers = [caller("a", 12), caller("b", 4, memory="m"), caller("c", 8), caller("d", 1)]
    found = [each.caller.name for each in answer(slots, callers)]
    assert found == ["b", "a", "c", "d"]
    assert slots.log == [
        "join 0 seed 12 with None", "join 1 seed 4 with m", "leave 1", "join 1 seed 8 with None", "leave 0", "leave 1",
        "join 0 seed 1 with None", "leave 0",
    ]  # fmt: skip


@pytest.mark.parametrize("late", [0, 3])
def test_memory_and_figures_are_of_the_recording_alone(late):
    options = AnswerOptions(stats_every=2, keep_memory=True)
    (found,) = answer(EchoSlots(late=late), [caller("a", 20)], options)
    assert found.memory == "memory of 5 frames"
    assert found.stats == [(2, ["2"]), (4, ["4"]), (5, ["5"])]
    (bare,) = answer(EchoSlots(), [caller("a", 20)])
    assert (bare.memory, bare.stats) == (None, [])


@pytest.mark.parametrize("error", [AudioError("no audio"), OSError("gone")])
def test_what_cannot_be_read_is_said_and_the_others_go_on(error):
    slots = EchoSlots(count=1)
    found = list(answer(slots, [unreadable("x", error), caller("a", 4), unreadable("y", error)]))
    assert [(type(each), each.caller.name) for each in found] == [(Unanswered, "x"), (Answer, "a"), (Unanswered, "y")]
    assert found[0].error is error
    assert slots.log == ["join 0 seed 4 with None", "leave 0"]


def test_an_error_of_the_engine_ends_all_and_frees_the_rows():
    slots = EchoSlots(fails_at=1)
    found = []
    with pytest.raises(RuntimeError, match="engine"):
        found += answer(slots, [caller("a", 4), caller("b", 8)])
    assert slots.heard == {}
    stopped = answer(slots := EchoSlots(), [caller("a", 4), caller("b", 80)])
    assert next(stopped).caller.name == "a"
    stopped.close()
    assert slots.heard == {}


def test_a_memory_that_is_refused_is_no_memory_of_one_recording_alone():
    class Refusing(EchoSlots):
        def join(self, row, settings, state=None):
            raise HostError("of another model")

    with pytest.raises(HostError, match="of another model"):
        list(answer(Refusing(), [caller("a", 4)]))


def test_every_frame_is_told_with_what_came_out_or_nothing():
    told = []
    list(answer(EchoSlots(late=1), [caller("a", 8)], on_frame=lambda who, out: told.append((who.name, out is None))))
    assert told == [("a", True), ("a", False), ("a", False)]
