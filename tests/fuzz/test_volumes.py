"""Random layers at random volumes against the definition, and mistakes that this finds."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given, note, settings

from moshi_ttt.core import block as blocks
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.plugins.hybrid import layer
from moshi_ttt.plugins.hybrid.block import HybridBlock
from tests.fuzz.rerun import command, run
from tests.fuzz.test_mutations import QUICK, failure
from tests.fuzz.volumes import heard_at_volumes

Patch = pytest.MonkeyPatch


@settings(max_examples=settings().max_examples * 2 // 5)
@given(case=heard_at_volumes())
def test_volumes(case):
    note(command(case))
    run(case)


def nobody_listens(patch: Patch) -> None:
    patch.setattr(SequenceBlock, "volume_in", lambda self, context: 1.0)


def zero_is_a_small_number(patch: Patch) -> None:
    def mutated(base, added, volume, dtype):
        factor = torch.as_tensor(volume, dtype=dtype).view(-1, 1, 1)
        return base + torch.where(factor == 0, 1e-9, factor) * added

    patch.setattr(layer, "at_volume", mutated)
    patch.setattr(blocks, "at_volume", mutated)


def the_reversed_pass_is_loud(patch: Patch) -> None:
    plain = HybridBlock._pass

    def mutated(self, x, state, context, gate, exact):
        loud = gate is getattr(self, "gate_reversed", None)
        patched = SequenceBlock.volume_in
        try:
            if loud:
                SequenceBlock.volume_in = lambda self, context: self.config.output_scale
            return plain(self, x, state, context, gate, exact)
        finally:
            SequenceBlock.volume_in = patched

    patch.setattr(HybridBlock, "_pass", mutated)


MISTAKES = [
    (nobody_listens, lambda case: case.length <= 2 and len(case.volumes) == 1),
    (zero_is_a_small_number, lambda case: 0 in (*case.volumes, case.scale) and len(case.volumes) == 1),
    (the_reversed_pass_is_loud, lambda case: case.layer.option["bidirectional"] and len(case.volumes) == 1),
]


@pytest.mark.exhaustive  # a test of tests
@pytest.mark.parametrize(("mutate", "left"), MISTAKES)
def test_a_mistake_with_the_volume(monkeypatch, mutate, left):
    with monkeypatch.context() as patch:
        mutate(patch)
        case = failure(heard_at_volumes())
        assert left(case), case
    run(case)


def test_what_is_drawn_covers_the_ends():
    for wanted in (0.0, 1.0, 2.0):
        case = hypothesis.find(heard_at_volumes(), lambda case, wanted=wanted: wanted in case.volumes, settings=QUICK)
        assert wanted in case.volumes
