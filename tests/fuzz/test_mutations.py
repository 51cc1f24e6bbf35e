"""The fuzz finds a mistake and shrinks it: each mutation is one, with what is left of the case that shows it.

Tests of tests: ``make test-full`` runs them, as CI does.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis.strategies import SearchStrategy

from moshi_ttt.core.block import BlockContext
from moshi_ttt.plugins.common import short_conv
from moshi_ttt.plugins.gating_mlp import chunkwise, ops
from moshi_ttt.plugins.hybrid import backends, block, chunk, fast_network, layer, recurrent
from moshi_ttt.plugins.hybrid.block import HybridBlock
from tests.fuzz.cases import Configuration, Layer
from tests.fuzz.comparison import differences, error
from tests.fuzz.configurations import by_definition
from tests.fuzz.rerun import command, run
from tests.fuzz.strategies import configurations, hybrid_layers, in_place_layers, schedules, spoiled_tokens

pytestmark = pytest.mark.exhaustive  # a test of tests

Patch = pytest.MonkeyPatch


def turns_the_other_way(patch: Patch) -> None:
    rotate = layer.rotate
    patch.setattr(layer, "rotate", lambda x, position, **more: rotate(x, -position, **more))


def mask_is_off_by_one(patch: Patch) -> None:
    query_pass = fast_network.query_pass

    def mutated(q, fast, memory, norm, scale, mask, *more):
        return query_pass(q, fast, memory, norm, scale, None if mask is None else mask.tril(-1), *more)

    for form in (chunk, recurrent):
        patch.setattr(form, "query_pass", mutated)


def streams_forget_a_chunk(patch: Patch) -> None:
    step = recurrent.recurrent_inner_loop

    def mutated(tokens, state, *others, **more):
        fast = {name: tensor.clone() for name, tensor in state.items() if name.startswith(("weight.", "bias."))}
        y = step(tokens, state, *others, **more)
        for name, tensor in fast.items():
            state[name].copy_(tensor)
        return y

    patch.setattr(backends, "recurrent_inner_loop", mutated)


def scale_goes_below_zero(patch: Patch) -> None:
    token_scale = HybridBlock.token_scale

    def mutated(self):
        if not self.causal:
            return token_scale(self)
        return 1 / torch.arange(1, self.config.chunk + 1, dtype=torch.float64) + self.token_scale_offset

    patch.setattr(HybridBlock, "token_scale", mutated)


def gradient_misses_the_deviation(patch: Patch) -> None:
    def mutated(v, k, weight, bias, eps, *_, **__):
        difference = v - k
        std = difference.std(-1, keepdim=True).detach()
        return weight * (difference - difference.mean(-1, keepdim=True)) / (std + eps) + bias + k

    patch.setattr(layer, "reconstruction_target", mutated)


def taps_are_the_other_way_round(patch: Patch) -> None:
    filtered = short_conv._filtered
    patch.setattr(short_conv, "_filtered", lambda window, taps, length: filtered(window, taps.flip(1), length))


def values_are_not_normalized(patch: Patch) -> None:
    patch.setattr(block, "rms_normalize", lambda e, exact=False: e)


def momentum_needs_no_gradient(patch: Patch) -> None:
    patch.setattr(fast_network, "_moving", lambda memory, rows: rows)


def later_steps_repeat_the_first(patch: Patch) -> None:
    patch.setattr(fast_network, "_again", lambda memory, *_: memory)


def even_kernels_look_back_further(patch: Patch) -> None:
    patch.setattr(ops, "left_padding", lambda kernel, padding: kernel - 1 if padding == "causal" else kernel // 2)


def decay_spares_nothing(patch: Patch) -> None:
    def mutated(delta, keys, values, ended, taught, decay):
        return (1 - decay) * (delta + keys.mT @ values)

    patch.setattr(chunkwise, "after_chunk", mutated)


def rows_cannot_switch_updates_off(patch: Patch) -> None:
    patch.setattr(BlockContext, "where_updated", lambda self, value: value)
    patch.setattr(BlockContext, "updates_mask", lambda self, like: None)


def tokens_are_taken_as_they_are(patch: Patch) -> None:
    def mutated(tokens, *_):
        return tokens, torch.ones(tokens.q.shape[:2], dtype=torch.bool)

    for form in (chunk, recurrent):
        patch.setattr(form, "only_finite", mutated)


QUICK = settings(max_examples=300, derandomize=True, database=None, deadline=None)


def failure(cases: SearchStrategy[Any]) -> Any:
    """What a failing case is shrunk to. Raises NoSuchExample where there is none."""

    def fails(case: Any) -> bool:
        try:
            run(case)
        except AssertionError:
            return True
        return False

    return hypothesis.find(cases, fails, settings=QUICK)


def options(case: Any) -> dict[str, Any]:
    return case.layer.options


def is_one_row(case: Any) -> bool:
    return len(case.learns) == 1


# What must be left after shrinking is what the mistake needs, and nothing more.
MISTAKES = [
    (turns_the_other_way, lambda case: is_one_row(case) and case.length == options(case)["chunk"] == 2),
    (mask_is_off_by_one, lambda case: is_one_row(case) and case.length == options(case)["chunk"] == 1),
    (scale_goes_below_zero, lambda case: is_one_row(case) and case.layer.causal),
    (gradient_misses_the_deviation, lambda case: is_one_row(case) and case.length == 1),
    (even_kernels_look_back_further, lambda case: is_one_row(case) and options(case)["conv_kernel"] == 2),
    (
        decay_spares_nothing,
        lambda case: options(case)["decay"] == 0.1 and case.length == options(case)["chunk"] + 1,
    ),
    (rows_cannot_switch_updates_off, lambda case: is_one_row(case) and case.learns == (False,)),
    (taps_are_the_other_way_round, lambda case: is_one_row(case) and options(case)["conv_kernel"] == 2),
    (values_are_not_normalized, lambda case: is_one_row(case) and case.length == 1),
    (later_steps_repeat_the_first, lambda case: is_one_row(case) and options(case)["inner_steps"] == 2),
]
IN_PLACE = (even_kernels_look_back_further, decay_spares_nothing, rows_cannot_switch_updates_off)


@pytest.mark.parametrize(("mutate", "left"), MISTAKES)
def test_a_mistake_in_a_call(monkeypatch, mutate, left):
    with monkeypatch.context() as patch:
        mutate(patch)
        of_its_kind = in_place_layers() if mutate in IN_PLACE else hybrid_layers()
        case = failure(configurations(of_its_kind))
        assert left(case), case
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)


@pytest.mark.parametrize("mutate", [streams_forget_a_chunk, mask_is_off_by_one, rows_cannot_switch_updates_off])
def test_a_mistake_in_a_stream(monkeypatch, mutate):
    with monkeypatch.context() as patch:
        mutate(patch)
        case = failure(schedules())
        assert (case.batch, len(case.events)) == (1, 1)
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)


def test_a_momentum_that_goes_on_while_updates_are_off(monkeypatch):
    with monkeypatch.context() as patch:
        momentum_needs_no_gradient(patch)
        case = failure(schedules(hybrid=True))
        assert (case.batch, options(case)["chunk"]) == (1, 1)
        assert any(getattr(event, "learns", True) in (False, (False,)) for event in case.events)
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)


def test_a_spoiled_token_that_is_used(monkeypatch):
    with monkeypatch.context() as patch:
        tokens_are_taken_as_they_are(patch)
        case = failure(spoiled_tokens())
        assert not case.layer.in_place
        with pytest.raises(AssertionError, match="not what the definition says"):
            run_printed(case)
    run_printed(case)


def test_the_bound_follows_what_an_ulp_moves():
    """Two channels a head: nearly equal numbers in a LayerNorm, where one ulp moves a gradient by 2e-11."""
    options = {"variant": "ttt_linear", "chunk": 4, "base_lr": 2.0, "bidirectional": True}
    layer = Layer(options=options, width=4, heads=2, spread=0.3, seed=59692)
    case = Configuration(layer=layer, learns=(True,), length=6, changed=1, seed=1)
    expected = by_definition(case)
    moved = {name: error(tensor, expected[name]) for name, tensor in by_definition(case, ulps=1).items()}
    assert 1e-12 < moved["gradient of fast_bias.0"] < 1e-9
    wrong = {**expected, "y": expected["y"] + 1e-9}
    assert differences(wrong, expected, 1e-10, lambda: moved)  # an ulp moves y by 3e-15: its bound stays
    assert not differences({**expected, "y": expected["y"] + 5e-11}, expected, 1e-10, lambda: moved)


def run_printed(case: Any) -> None:
    """Run a case by the command that is printed for it."""
    _, source, _ = command(case).split('"')
    exec(source, {})
