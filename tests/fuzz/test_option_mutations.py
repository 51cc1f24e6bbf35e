"""The fuzz finds a mistake in one line of an option's form, and shrinks it to what the mistake needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis.strategies import SearchStrategy

from moshi_ttt.plugins.common.success_gate import SuccessGate
from moshi_ttt.plugins.gating_mlp import block, corrections
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper
from moshi_ttt.plugins.hybrid import fast_network, objective
from tests.fuzz.cases import Layer
from tests.fuzz.strategies import configurations, hybrid_layers, in_place_layers, schedules
from tests.fuzz.test_mutations import failure, is_one_row, options, run_printed
from tests.unit.plugins.stepper_mutations import (
    a_chunk_that_goes_on_forgets_its_factor,
    a_stream_solves_with_less_ridge,
)

pytestmark = pytest.mark.exhaustive  # a test of tests

Patch = pytest.MonkeyPatch


def a_call_solves_with_less_ridge(patch: Patch) -> None:
    solved = corrections.solved
    patch.setattr(corrections, "solved", lambda keys, errors, ridge: solved(keys, errors, 0.9 * ridge))


def strengths_have_no_root(patch: Patch) -> None:
    rate = GatingMLP._rate

    def mutated(self, x):
        return rate(self, x).square() if self.config.update == "ridge" else rate(self, x)

    patch.setattr(GatingMLP, "_rate", mutated)


def strengths_are_those_of_hebbian(patch: Patch) -> None:
    rate = GatingMLP._rate

    def mutated(self, x):
        twice = self.config.update == "gradient" and self.config.learned_lr
        return 2 * rate(self, x) if twice else rate(self, x)

    patch.setattr(GatingMLP, "_rate", mutated)


def keys_keep_their_norm(patch: Patch) -> None:
    """Targets, too: they share the line."""
    patch.setattr(block, "directions", lambda x: x)


def a_call_reads_at_scale_one(patch: Patch) -> None:
    def mutated(self, answers, gate, projection):
        return (answers if gate is None else answers * gate) @ projection

    patch.setattr(GatingMLP, "_read", mutated)


def a_score_counts_twice(patch: Patch) -> None:
    gate = SuccessGate._gate
    patch.setattr(SuccessGate, "_gate", lambda self, scores: gate(self, [scores[0], scores[0], *scores[2:]]))


def a_query_is_added_without_a_norm(patch: Patch) -> None:
    patch.setattr(objective.PlainLoss, "output", lambda self, q, z: q + z)


def queries_do_not_read_the_velocity(patch: Patch) -> None:
    patch.setattr(fast_network, "_has_gradient", lambda memory, mask: torch.zeros(1, 1, 1, 1, dtype=torch.bool))


def a_stream_corrects_nothing(patch: Patch) -> None:
    """It adds, as with ``update: hebbian``."""
    step = Stepper.step

    def mutated(self, *arguments, **more):
        memory = self.memory
        self.memory = replace(memory, update_rule="hebbian")
        try:
            return step(self, *arguments, **more)
        finally:
            self.memory = memory

    patch.setattr(Stepper, "step", mutated)


def corrects(update: str, **wanted: Any) -> SearchStrategy[Layer]:
    """Layers of gating_mlp with this update, and other options as they are ``wanted``."""
    chosen = {"update": update, **wanted}
    return in_place_layers().filter(lambda layer: all(layer.option[n] == value for n, value in chosen.items()))


def is_one_chunk(case: Any) -> bool:
    """The memory after the chunk tells."""
    return is_one_row(case) and case.length == options(case)["chunk"]


def is_after_one_chunk(case: Any) -> bool:
    return is_one_row(case) and case.length == options(case)["chunk"] + 1


MISTAKES: list[tuple[Callable[[Patch], None], SearchStrategy[Layer], Callable[[Any], bool]]] = [
    (a_call_solves_with_less_ridge, corrects("ridge"), is_one_chunk),
    (strengths_have_no_root, corrects("ridge"), is_one_chunk),
    (strengths_are_those_of_hebbian, corrects("gradient", learned_lr=True), is_one_chunk),
    (keys_keep_their_norm, corrects("gradient", keys="unit"), is_one_chunk),
    (a_call_reads_at_scale_one, corrects("ridge", read_scale=8.0), is_after_one_chunk),
    (a_score_counts_twice, corrects("ridge", success_gate=True), is_one_row),
    (
        a_query_is_added_without_a_norm,
        hybrid_layers().filter(lambda layer: not layer.option["inner_norm"]),
        lambda case: is_one_row(case) and case.length == 1,
    ),
    (
        queries_do_not_read_the_velocity,
        hybrid_layers().filter(lambda layer: layer.option["momentum"] or layer.options.get("learned_momentum")),
        is_after_one_chunk,
    ),
]


@pytest.mark.parametrize(("mutate", "layers", "left"), MISTAKES)
def test_a_mistake_in_a_call(monkeypatch, mutate, layers, left):
    with monkeypatch.context() as patch:
        mutate(patch)
        case = failure(configurations(layers))
        assert left(case), case
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)


STREAMS = [
    (a_stream_solves_with_less_ridge, "ridge"),
    (a_chunk_that_goes_on_forgets_its_factor, "ridge"),
    (a_stream_corrects_nothing, "gradient"),
]


@pytest.mark.parametrize(("mutate", "update"), STREAMS)
def test_a_mistake_in_a_stream(monkeypatch, mutate, update):
    with monkeypatch.context() as patch:
        mutate(patch)
        case = failure(schedules(corrects(update)))
        assert case.batch == 1
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)
