"""``moshi-ttt verify`` is red for each mistake in a form of an option: one line of the form is changed at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moshi_ttt import default_registry
from moshi_ttt.apps.verify import verify_file
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.plugins.common import short_conv, success_gate
from moshi_ttt.plugins.gating_mlp import block, chunk, chunkwise, corrections, ops, option_verifiers
from moshi_ttt.plugins.gating_mlp import naive as in_place_naive
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper
from moshi_ttt.plugins.hybrid import block as hybrid_block
from moshi_ttt.plugins.hybrid import fast_network, naive, objective
from moshi_ttt.plugins.ttt_mlp.verifiers import OPTIONS_CHUNK
from tests.conformance.verify.test_verify import GOLDENS, read
from tests.unit.plugins.gating import build
from tests.unit.plugins.stepper_mutations import a_stream_folds_without_decay

Patch = pytest.MonkeyPatch
CALL, STREAM, DEFINITION = "options_chunk", "options_recurrent", "options_naive"


def ridge_is_twice_as_large(patch: Patch) -> None:
    patch.setattr(block, "ridge_of", lambda log_ridge: 2 * corrections.ridge_of(log_ridge))


def a_calls_factor_has_no_ridge(patch: Patch) -> None:
    solved = corrections.solved
    patch.setattr(corrections, "solved", lambda keys, errors, ridge: solved(keys, errors, 0.9 * ridge))


def a_streams_factor_has_no_ridge(patch: Patch) -> None:
    solve = Stepper._solve

    def mutated(self, state, key, errors, ridge, *others):
        return solve(self, state, key, errors, 0.9 * ridge, *others)

    patch.setattr(Stepper, "_solve", mutated)


def strengths_have_no_root(patch: Patch) -> None:
    rate = GatingMLP._rate
    patch.setattr(GatingMLP, "_rate", lambda self, x: rate(self, x).square())


def keys_keep_their_norm(patch: Patch) -> None:
    patch.setattr(block, "directions", lambda x: x)


def targets_have_norm_one(patch: Patch) -> None:
    token = GatingMLP._token

    def mutated(self, hidden, x, context):
        key, target, rate = token(self, hidden, x, context)
        return key, target / target.norm(dim=-1, keepdim=True), rate

    patch.setattr(GatingMLP, "_token", mutated)


def decay_comes_after_the_update(patch: Patch) -> None:
    def mutated(delta, keys, values, ended, applied, decay):
        return torch.where(ended[:, None, None], (1 - decay) * (delta + keys.mT @ values), delta)

    patch.setattr(chunkwise, "after_chunk", mutated)


def answers_are_read_at_scale_one(patch: Patch) -> None:
    patch.setattr(GatingMLP, "_read", lambda self, answers, gate, projection: answers @ projection)


def scores_are_off_by_one(patch: Patch) -> None:
    step, forward = success_gate.SuccessGate.step, success_gate.SuccessGate.forward

    def stepped(self, answer, value, state, active=None):
        state.answer.copy_(answer)
        return step(self, answer, value, state, active)

    def called(self, answers, values, state=None):
        later = torch.cat([answers[:, 1:], answers[:, -1:]], dim=1)
        return forward(self, later, values, state)

    patch.setattr(success_gate.SuccessGate, "step", stepped)
    patch.setattr(success_gate.SuccessGate, "forward", called)


def the_filter_is_late(patch: Patch) -> None:
    patch.setattr(ops, "left_padding", lambda kernel, padding: (kernel - 1) // 2 + 1)


def the_definition_forgets_its_answers(patch: Patch) -> None:
    writes = in_place_naive.writes

    def mutated(update, keys, values, answers, rate, ridge):
        return writes(update, keys, values, 0 * answers, rate, ridge)

    patch.setattr(in_place_naive, "writes", mutated)


def a_call_forgets_its_answers(patch: Patch) -> None:
    original = corrections.corrected

    def mutated(memory, *others):
        out = original(memory, *others)
        out.answers = [torch.zeros_like(answer) for answer in out.answers]
        return out

    patch.setattr(chunk, "corrected", mutated)


def the_definitions_gate_hears_itself(patch: Patch) -> None:
    gates = option_verifiers._gates
    patch.setattr(option_verifiers, "_gates", lambda answers, target, inputs: gates(target, target, inputs))


def taps_are_the_other_way_round(patch: Patch) -> None:
    filtered = short_conv._filtered
    patch.setattr(short_conv, "_filtered", lambda window, taps, length: filtered(window, taps.flip(1), length))


def the_definitions_taps_are_the_other_way_round(patch: Patch) -> None:
    convolved = naive.convolved
    patch.setattr(naive, "convolved", lambda z, taps: convolved(z, taps.flip(1)))


def embeddings_are_not_normalized(patch: Patch) -> None:
    patch.setattr(hybrid_block, "rms_normalize", lambda e, exact=False: e)


def queries_are_added_without_a_norm(patch: Patch) -> None:
    patch.setattr(objective.PlainLoss, "output", lambda self, q, z: q + z)


def the_loss_takes_the_key_off(patch: Patch) -> None:
    patch.setattr(objective.PlainLoss, "target", lambda self, v, k: v - k)


def later_steps_repeat_the_first(patch: Patch) -> None:
    patch.setattr(fast_network, "_again", lambda memory, *_: memory)


def a_call_drops_its_velocity(patch: Patch) -> None:
    after = fast_network._velocity_after

    def mutated(fast, memory, applied, rows, momentum):
        return after(fast, memory, applied, rows, 0.5 * momentum)

    patch.setattr(fast_network, "_velocity_after", mutated)


def a_stream_drops_its_velocity(patch: Patch) -> None:
    step = fast_network._step_

    def mutated(fast, memory, factor, rows, momentum):
        return step(fast, memory, factor, rows, None if momentum is None else 0.5 * momentum)

    patch.setattr(fast_network, "_step_", mutated)


def queries_do_not_read_the_velocity(patch: Patch) -> None:
    patch.setattr(fast_network, "_has_gradient", lambda memory, mask: torch.zeros(1, 1, 1, 1, dtype=torch.bool))


BOTH = {CALL, STREAM}
MISTAKES: list[tuple[Callable[[Patch], None], str, set[str]]] = [
    (ridge_is_twice_as_large, "in_place_ridge", BOTH),
    (a_calls_factor_has_no_ridge, "in_place_ridge", {CALL}),
    (a_streams_factor_has_no_ridge, "in_place_ridge", {STREAM}),
    (strengths_have_no_root, "in_place_ridge_unit", BOTH),
    (keys_keep_their_norm, "in_place_ridge_unit", BOTH),
    (keys_keep_their_norm, "in_place_gradient", BOTH),
    (targets_have_norm_one, "in_place_gradient", BOTH),
    (decay_comes_after_the_update, "in_place_gradient", {CALL}),
    (a_stream_folds_without_decay, "in_place_gradient", {STREAM}),
    (answers_are_read_at_scale_one, "in_place_gate", {CALL}),
    (scores_are_off_by_one, "in_place_gate", BOTH),
    (scores_are_off_by_one, "in_place_shipped", BOTH),
    (the_filter_is_late, "in_place_start", {CALL, DEFINITION}),
    (a_call_forgets_its_answers, "in_place_start", {CALL}),
    (the_definition_forgets_its_answers, "in_place_gradient", {DEFINITION}),
    (the_definition_forgets_its_answers, "in_place_ridge", {DEFINITION}),
    (the_definitions_gate_hears_itself, "in_place_shipped", {DEFINITION}),
    (taps_are_the_other_way_round, "hybrid_conv", BOTH),
    (the_definitions_taps_are_the_other_way_round, "hybrid_conv", {DEFINITION}),
    (embeddings_are_not_normalized, "hybrid_value", BOTH),
    (queries_are_added_without_a_norm, "hybrid_no_norm", BOTH),
    (the_loss_takes_the_key_off, "hybrid_no_norm", BOTH),
    (later_steps_repeat_the_first, "hybrid_steps", BOTH),
    (a_call_drops_its_velocity, "hybrid_momentum", {CALL}),
    (a_stream_drops_its_velocity, "hybrid_momentum", {STREAM}),
    (queries_do_not_read_the_velocity, "hybrid_momentum", BOTH),
    (taps_are_the_other_way_round, "hybrid_options_linear", BOTH),
    (later_steps_repeat_the_first, "hybrid_options_mlp_noncausal", {CALL}),
    (queries_do_not_read_the_velocity, "hybrid_options_multilayer3", BOTH),
]
OPTIONS = sorted(
    path for path in GOLDENS.glob("*.safetensors") if read(path)[1]["op"] in ("in_place_options", "hybrid_options")
)


def red(path) -> set[str]:
    """Which forms of a file have a comparison above its tolerance, in float64."""
    report = verify_file(path, default_registry())
    assert not report.problems
    wrong = [each for each in report.comparisons if not each.passed and each.dtype == torch.float64]
    return {each.verifier.split("-")[1] for each in wrong}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_form_is_right(path):
    report = verify_file(path, default_registry())
    assert report.passed
    causal = read(path)[1].get("causal") != "false"
    forms = {each.verifier.split("-")[1] for each in report.comparisons}
    assert forms == ({CALL, STREAM, DEFINITION} if causal else {CALL, DEFINITION})


@pytest.mark.parametrize(
    ("mutate", "name", "forms"), MISTAKES, ids=[f"{mutate.__name__}-{name}" for mutate, name, _ in MISTAKES]
)
def test_a_mistake_is_red(monkeypatch, mutate, name, forms):
    with monkeypatch.context() as patch:
        mutate(patch)
        assert red(GOLDENS / f"{name}.safetensors") == forms


def test_every_file_catches_a_mistake():
    assert {path.stem for path in OPTIONS} == {name for _, name, _ in MISTAKES}


def test_the_start_of_next_frame_is_the_files():
    tensors, metadata = read(GOLDENS / "in_place_start.safetensors")
    started = build(excite=False, start="next_frame", conv_kernel=int(metadata["conv_kernel_size"]))
    width = tensors["in.conv"].shape[0]
    assert torch.equal(started.conv[:width], tensors["in.conv"])
    assert torch.equal(started.projection[:width, :width], tensors["in.proj"])
    assert tensors["grad.proj"].any(), "it learns"


def test_a_file_of_ttt_mlp_with_another_width_says_so():
    tensors, metadata = read(GOLDENS / "hybrid_steps.safetensors")
    inputs = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("in.")}
    inputs["weight.1"] = inputs["weight.1"][:, :-1]
    with pytest.raises(ConfigError, match="hidden width of 15 and heads of width 8"):
        OPTIONS_CHUNK.run(inputs, metadata)
