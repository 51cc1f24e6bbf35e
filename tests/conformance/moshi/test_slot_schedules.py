"""Slots equal the same caller alone, bit for bit, whatever others do; and what would break that is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.sampling import SlotGenerator
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.hosts.moshi.stream_values import StreamValue
from tests.conformance.moshi.slot_schedules import (
    VARIANTS,
    assert_same,
    callers,
    codec,
    draw_schedule,
    make_slots,
    perform,
)

pytestmark = pytest.mark.each_kind

SLOW_SCHEDULES = 36  # of each of six variants


def check_schedule(variant: str, seed: int) -> None:
    schedule = draw_schedule(seed, blocks=variant != "base")
    together = perform(make_slots(variant), schedule)
    assert sorted(together) == [caller for caller in callers(schedule) if caller in together]
    for caller, heard in together.items():
        alone = perform(make_slots(variant), schedule, only=caller)
        assert_same(heard, alone[caller], f"{variant}, schedule {seed}, caller {caller}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_caller_hears_what_it_hears_alone(variant):
    check_schedule(variant, list(VARIANTS).index(variant))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SLOW_SCHEDULES))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_caller_hears_what_it_hears_alone_over_many_schedules(variant, seed):
    check_schedule(variant, 1000 + seed)


def test_schedules_have_everything_in_them():
    schedules = [draw_schedule(seed) for seed in range(len(VARIANTS))]
    names = {event.name for schedule in schedules for tick in schedule for event in tick.events}
    assert names == {"join", "leave", "move", "save", "restart", "forget", "set_updates", "set_volume"}
    joins = [e for schedule in schedules for tick in schedule for e in tick.events if e.name == "join"]
    assert any(event.arguments[2] is not None for event in joins), "somebody returns with what it saved"
    assert any(not tick.speaking for schedule in schedules for tick in schedule[:-1]), "nobody has a frame"


# ----------------------------------------------------------------------------------------------------------- mutations
def masks_before_resets(patch: pytest.MonkeyPatch) -> None:
    """The mask is set when it changes, and a reset in between sets its row's."""
    plain, last = SlotGenerator.set_exec_mask, {}

    def set_exec_mask(self: SlotGenerator, mask: torch.Tensor) -> None:
        if id(self) not in last or not torch.equal(last[id(self)], mask):
            plain(self, mask)
        last[id(self)] = mask

    patch.setattr(SlotGenerator, "set_exec_mask", set_exec_mask)


def shared_generator(patch: pytest.MonkeyPatch) -> None:
    plain = SlotGenerator.draw
    shared = torch.Generator().manual_seed(0)
    patch.setattr(SlotGenerator, "draw", lambda self, generators: plain(self, dict.fromkeys(generators, shared)))


def whole_ring_saved(patch: pytest.MonkeyPatch) -> None:
    plain = StreamValue.row_snapshot

    def row_snapshot(self: StreamValue, row: int) -> torch.Tensor:
        return self.row(row).clone().contiguous() if self.form == "ring" else plain(self, row)

    patch.setattr(StreamValue, "row_snapshot", row_snapshot)


def one_mask_for_encoder_and_decoder(patch: pytest.MonkeyPatch) -> None:
    mimi, encoded = codec(), []
    plain_encode, plain_mask, plain_tick = mimi.encode, mimi.set_exec_mask, Slots.tick

    def encode(pcm: torch.Tensor) -> torch.Tensor:
        encoded.append(True)
        return plain_encode(pcm)

    def tick(self: Slots, frames: Any) -> Any:
        encoded.clear()
        return plain_tick(self, frames)

    patch.setattr(mimi, "encode", encode)
    patch.setattr(mimi, "set_exec_mask", lambda mask: None if encoded else plain_mask(mask))
    patch.setattr(Slots, "tick", tick)


def first_frame_lost(patch: pytest.MonkeyPatch) -> None:
    """Nobody makes the step whose input is ignored, so a caller's first frame is in it."""
    plain, made = Slots._step, set()

    def step(self: Slots, codes: torch.Tensor, rows: Any) -> Any:
        first = {id(self._rows[row]) for row in rows if not self._rows[row].steps} - made
        made.update(first)
        return None if first else plain(self, codes, rows)

    patch.setattr(Slots, "_step", step)


def switches_left_behind(patch: pytest.MonkeyPatch) -> None:
    plain = Slots.join

    def join(self: Slots, row: int, settings: Any, state: Any = None) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(self._streams), "switch", lambda *_: None)
            plain(self, row, settings, state)

    patch.setattr(Slots, "join", join)


MUTATIONS = (
    masks_before_resets, shared_generator, whole_ring_saved, one_mask_for_encoder_and_decoder, first_frame_lost,
    switches_left_behind,
)  # fmt: skip


@pytest.mark.exhaustive  # a test of tests
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_noticed(mutation):
    """Together with the mutation, alone without it."""
    for seed in range(5):
        schedule = draw_schedule(seed, ticks=10)
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            try:
                together = perform(make_slots("ttt_linear"), schedule)
            except HostError:  # a session that no stream has, such as a whole ring, is refused
                return
        for caller, heard in together.items():
            alone = perform(make_slots("ttt_linear"), schedule, only=caller)
            try:
                assert_same(heard, alone[caller])
            except AssertionError:
                return
    pytest.fail(f"{mutation.__name__} went unnoticed")
