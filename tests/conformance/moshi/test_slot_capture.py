"""A step of slots is safe in a captured graph: no device synchronization, no state in Python, addresses that stay.

No graph is captured on a CPU. ``Captured`` stands in for Moshi's ``CUDAGraphed`` with the same rules: the first call
runs, the second is recorded, and from the third on the recorded kernels run again on the recorded tensors, without
Python.
"""

from __future__ import annotations

from typing import Any

import moshi.models.compression
import moshi.models.lm
import moshi.modules.streaming
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from moshi_ttt.hosts.moshi.row_streams import RowStreams
from moshi_ttt.hosts.moshi.sampling import SlotGenerator, SlotSettings
from moshi_ttt.hosts.moshi.slots import Slots
from tests.conformance.moshi.slot_schedules import (
    VARIANTS,
    assert_same,
    callers,
    codec,
    draw_schedule,
    frame_of,
    make_slots,
    model_with,
    perform,
)
from tests.conformance.moshi.test_streaming import Recorder

pytestmark = pytest.mark.each_kind

WITH_BLOCKS = [name for name in VARIANTS if name != "base"]


class Captured:
    """Moshi's ``CUDAGraphed``, with a ``Recorder`` for the graph."""

    made: list[Captured]
    inside = False

    def __init__(self, func: Any, warmup_steps: int = 1, disable: bool = False) -> None:
        self.func, self.warmup_steps = func, warmup_steps
        self.graph: Recorder | None = None
        self.arguments: tuple[Any, ...] = ()
        self.output: Any = None
        self.replays = 0
        Captured.made.append(self)

    def __call__(self, *arguments: Any) -> Any:
        if Captured.inside:
            return self.func(*arguments)
        if self.graph is not None:
            for own, given in zip(self.arguments, arguments, strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(given)
                else:
                    assert own is given
            self.graph.replay()
            self.replays += 1
            return self.output
        Captured.inside = True
        try:
            if self.warmup_steps > 0:
                self.warmup_steps -= 1
                return self.func(*arguments)
            self.arguments = tree_map_only(torch.Tensor, torch.clone, arguments)
            with Recorder() as graph:
                self.output = self.func(*self.arguments)
            self.graph = graph
            return self.output
        finally:
            Captured.inside = False


@pytest.fixture
def captured(monkeypatch):
    """Moshi captures what it would capture on CUDA."""
    Captured.made = []
    for module in (moshi.models.lm, moshi.models.compression, moshi.modules.streaming):
        monkeypatch.setattr(module, "CUDAGraphed", Captured)
    return Captured.made


def three_chunks(variant: str) -> tuple[list[Any], list[Any]]:
    """What two callers of ``variant`` get over more than three chunks, and the figures of their memory."""
    with make_slots(variant) as slots:
        slots.join(0, SlotSettings(seed=1))
        slots.join(2, SlotSettings(seed=2, temperature=0, volume=0.5))
        heard: list[Any] = []
        for number in range(14):
            said = {0: frame_of(1, number)} | ({2: frame_of(2, number)} if number % 4 else {})
            heard += slots.tick(said).values()
        return [*heard, *(slots.save_row(row, "session") for row in (0, 2))], [slots.stats(row) for row in (0, 2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_step_replayed_over_three_chunks_equals_live_ones(variant):
    live, live_stats = three_chunks(variant)
    with pytest.MonkeyPatch.context() as patch:
        Captured.made = []
        for module in (moshi.models.lm, moshi.models.compression, moshi.modules.streaming):
            patch.setattr(module, "CUDAGraphed", Captured)
        replayed, replayed_stats = three_chunks(variant)
    assert_same(replayed, live, variant)
    assert replayed_stats == live_stats
    if variant != "base":
        assert {each.updates for each in live_stats[0]} == {5}  # 15 tokens in chunks of 3
    # The language model, the depth transformer, four parts of the codec, and the masks of both; the model's own masks
    # are set inside the graph of the loop's.
    replays = sorted(each.replays for each in Captured.made)
    assert replays[0] == 0
    assert len(replays) == 9
    assert replays[1] >= 11


def test_captured_slots_equal_each_caller_alone(captured):
    """Joins, leaves, resets, restores and switches between replays."""
    schedule = draw_schedule(3, ticks=14)
    together = perform(make_slots("ttt_mlp"), schedule)
    assert sum(each.replays for each in captured) > 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moshi.models.lm.CUDAGraphed, "__call__", lambda self, *arguments: self.func(*arguments))
        for caller in callers(schedule):
            if caller in together:
                alone = perform(make_slots("ttt_mlp"), schedule, only=caller)
                assert_same(together[caller], alone[caller], f"caller {caller}")


def test_nothing_that_a_graph_reads_moves():
    with make_slots("ttt_mlp") as slots:
        addresses = _addresses(slots)
        slots.join(0, SlotSettings(seed=1))
        for number in range(4):
            slots.tick({0: frame_of(1, number)})
        state = slots.save_row(0, "session")
        slots.set_updates(0, False)
        slots.set_volume(0, 0.5)
        slots.forget(0)
        slots.join(1, SlotSettings(temperature=0.1, top_k=3), state)
        slots.tick({1: frame_of(1, 4), 0: frame_of(1, 5)})
        slots.leave(0)
        assert _addresses(slots) == addresses


def _addresses(slots: Slots) -> dict[str, int]:
    # The codec's resampling and the loop's offsets are outside what Moshi captures, and are replaced at every step.
    replaced = ("/first", "lm/offsets")
    found = {name: v.value.data_ptr() for name, v in slots._streams.values.items() if not name.endswith(replaced)}
    for kind in ("text", "audio"):
        noise = getattr(slots._generator, kind)
        found |= {f"{kind}.{name}": getattr(noise, name).data_ptr() for name in ("noise", "temperature", "top_k")}
    for number, block in enumerate(slots._streams.blocks):
        found |= {f"{number}.{name}": getattr(block, name).data_ptr() for name in ("updates", "volume", "exec_mask")}
        found |= {f"{number}.recent": block.recent.x.data_ptr()}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_step_reads_no_value(variant):
    """A fake tensor has no value: to read one raises."""
    model, mimi = model_with(variant), codec()
    with FakeTensorMode(allow_non_fake_inputs=True):
        generator = SlotGenerator(model, 2)
        streams = RowStreams(generator, mimi, 2)
        try:
            generator.set_row(1, SlotSettings())
            for step in range(2):
                streams.clear(step)
                for name, value in (("updates", False), ("volume", 0.5)):
                    streams.switch(1, name, value)
                for module in (mimi, generator):
                    module.set_exec_mask(torch.tensor([True, False]))
                codes = mimi.encode(torch.zeros(2, 1, 1920))
                tokens = generator.step(codes)
                mimi.decode(tokens[:, 1:].clamp(min=0))
                streams.forget(0)
            with pytest.raises(DataDependentOutputException):
                int(tokens[0, 0, 0])
        finally:
            # Leaving a stream reports what was skipped, which reads.
            for module in (*mimi.modules(), *generator.modules()):
                if hasattr(module, "_streaming_state"):
                    module._streaming_state = None
