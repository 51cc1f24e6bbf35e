"""The kit must fail a mistake in one line of an option's form: updates that correct, the gate, the hybrid options."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from moshi_ttt.core import testing as kit
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.testing import BlockCase, default_cases
from moshi_ttt.plugins.common import short_conv
from moshi_ttt.plugins.common.success_gate import SuccessGate
from moshi_ttt.plugins.gating_mlp import block, corrections, recurrent
from moshi_ttt.plugins.gating_mlp import compiled as gating
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.corrections import ChunkwiseMemory, ParallelMemory
from moshi_ttt.plugins.hybrid import block as hybrid_block
from moshi_ttt.plugins.hybrid import fast_network
from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.ttt_ridge import compiled as ridge
from tests.conformance.variants.grid import runs_by_default
from tests.unit.plugins.stepper_mutations import (
    a_chunk_that_goes_on_forgets_its_factor,
    a_stream_folds_without_decay,
    a_stream_solves_with_less_ridge,
)

pytestmark = pytest.mark.exhaustive  # a test of tests

Patch = pytest.MonkeyPatch


# ---- updates that correct


def a_stream_keeps_its_factor(patch: Patch) -> None:
    advance = recurrent._advance

    def mutated(state, new, ends, active):
        is_factor = state.dim() == 3 and state.shape[1] == state.shape[2]
        return advance(state, new, torch.zeros_like(ends) if is_factor else ends, active)

    patch.setattr(recurrent, "_advance", mutated)


def a_call_is_asked_before_it_is_told(patch: Patch) -> None:
    """The memory's answers to a chunk are those of the chunk before."""
    for memory in (ParallelMemory, ChunkwiseMemory):

        def mutated(self, queries, read=memory.read):
            late = getattr(self, "late", None)
            self.late = read(self, queries)
            return self.late if late is None else late

        patch.setattr(memory, "read", mutated)


def strengths_ignore_the_schedule(patch: Patch) -> None:
    rate = GatingMLP._rate

    def mutated(self, x):
        before, self.inner_lr_factor = self.inner_lr_factor, 1.0
        try:
            return rate(self, x)
        finally:
            self.inner_lr_factor = before

    patch.setattr(GatingMLP, "_rate", mutated)


def rows_cannot_switch_updates_off(patch: Patch) -> None:
    patch.setattr(BlockContext, "where_updated", lambda self, value: value)


def the_ridge_is_read_on_the_host(patch: Patch) -> None:
    patch.setattr(block, "ridge_of", lambda log_ridge: torch.full((1,), math.exp(float(log_ridge))).double())


def the_ridge_has_no_gradient(patch: Patch) -> None:
    patch.setattr(block, "ridge_of", lambda log_ridge: corrections.ridge_of(log_ridge.detach()))


def keys_share_one_norm(patch: Patch) -> None:
    patch.setattr(block, "directions", lambda x: x / x.norm(dim=(0, 2), keepdim=True))


def keys_are_normalized_over_time(patch: Patch) -> None:
    patch.setattr(block, "directions", lambda x: x / x.norm(dim=(1, 2), keepdim=True))


def a_call_reads_at_scale_one(patch: Patch) -> None:
    def mutated(self, answers, gate, projection):
        return (answers if gate is None else answers * gate) @ projection

    patch.setattr(GatingMLP, "_read", mutated)


# ---- the success gate


def the_gate_forgets_the_mask(patch: Patch) -> None:
    step = SuccessGate.step
    patch.setattr(SuccessGate, "step", lambda self, answer, value, state, active=None: step(self, answer, value, state))


def the_gate_knows_the_next_target(patch: Patch) -> None:
    success = GatingMLP._success

    def mutated(self, answers, target, state):
        return success(self, answers, None if target is None else target.roll(-1, dims=1), state)

    patch.setattr(GatingMLP, "_success", mutated)


def a_calls_gate_starts_anew(patch: Patch) -> None:
    forward = SuccessGate.forward
    patch.setattr(SuccessGate, "forward", lambda self, answers, values, state=None: forward(self, answers, values))


# ---- hybrid options


def a_steps_taps_are_the_other_way_round(patch: Patch) -> None:
    step = short_conv.convolve_step
    patch.setattr(short_conv, "convolve_step", lambda z, taps, *others: step(z, taps.flip(1), *others))


def the_cache_forgets_the_mask(patch: Patch) -> None:
    step = short_conv.convolve_step
    patch.setattr(
        short_conv, "convolve_step", lambda z, taps, cache, exec_mask=None, kept=None: step(z, taps, cache, kept=kept)
    )


def the_cache_is_memory(patch: Patch) -> None:
    patch.setattr(HybridBlock, "memory_names", super(HybridBlock, HybridBlock).memory_names)


def the_filter_looks_ahead(patch: Patch) -> None:
    filtered = short_conv._filtered
    patch.setattr(short_conv, "_filtered", lambda window, taps, n: filtered(window.roll(-1, dims=1), taps, n))


def the_filter_mixes_rows(patch: Patch) -> None:
    filtered = short_conv._filtered
    patch.setattr(short_conv, "_filtered", lambda window, taps, n: filtered(window.roll(1, dims=0), taps, n))


def embeddings_share_one_norm(patch: Patch) -> None:
    patch.setattr(
        hybrid_block, "rms_normalize", lambda e, exact=False: e / e.square().mean((1, 2), keepdim=True).sqrt()
    )


def a_streams_later_steps_see_half_the_keys(patch: Patch) -> None:
    only = fast_network._only

    def mutated(memory, rows):
        kept = only(memory, rows)
        return fast_network.ChunkMemory((kept.inputs[0] / 2, *kept.inputs[1:]), kept.gradients, kept.tokens)

    patch.setattr(fast_network, "_only", mutated)


def a_call_drops_its_velocity(patch: Patch) -> None:
    after = fast_network._velocity_after

    def mutated(*arguments):
        return tuple(torch.zeros_like(velocity) for velocity in after(*arguments))

    patch.setattr(fast_network, "_velocity_after", mutated)


def the_velocity_is_kept_in_the_hosts_dtype(patch: Patch) -> None:
    init_state = HybridBlock.init_state

    def mutated(self, *arguments):
        state = init_state(self, *arguments)
        return {n: t.to(self.info.dtype) if n.startswith("velocity") else t for n, t in state.items()}

    patch.setattr(HybridBlock, "init_state", mutated)


def a_third_head_has_no_velocity(patch: Patch) -> None:
    after = fast_network._velocity_after

    def mutated(*arguments):
        kept = [velocity.clone() for velocity in after(*arguments)]  # [B, H, in, out]
        for velocity in kept:
            velocity[:, 2:] = 0
        return tuple(kept)

    patch.setattr(fast_network, "_velocity_after", mutated)


def the_velocity_is_no_memory(patch: Patch) -> None:
    names = HybridBlock.memory_names
    patch.setattr(
        HybridBlock, "memory_names", lambda self: frozenset(n for n in names(self) if not n.startswith("velocity"))
    )


RIDGE = {"chunk": 4, "update": "ridge", "keys": "unit", "lr": 1.0, "learned_lr": True}
GRADIENT = {"chunk": 4, "update": "gradient", "keys": "unit"}
CONVOLVED = {"chunk": 4, "conv_kernel": 3}
MOMENTUM = {"chunk": 4, "learned_momentum": True, "momentum": 0.8}
Check = Callable[[BlockCase], None]
MUTATIONS: list[tuple[Callable[[Patch], None], str, dict[str, Any], Check]] = [
    (a_chunk_that_goes_on_forgets_its_factor, "gating_mlp", RIDGE, kit.check_splits),
    (a_stream_solves_with_less_ridge, "gating_mlp", RIDGE, kit.check_splits),
    (a_stream_keeps_its_factor, "gating_mlp", RIDGE, kit.check_every_prefix),
    (a_stream_folds_without_decay, "gating_mlp", {**RIDGE, "decay": 0.2}, kit.check_splits),
    (a_stream_folds_without_decay, "gating_mlp", {**GRADIENT, "decay": 0.2}, kit.check_splits),
    (a_call_is_asked_before_it_is_told, "gating_mlp", RIDGE, kit.check_splits),
    (a_call_is_asked_before_it_is_told, "gating_mlp", GRADIENT, kit.check_splits),
    (strengths_ignore_the_schedule, "gating_mlp", RIDGE, kit.check_inner_lr_factor),
    (strengths_ignore_the_schedule, "gating_mlp", GRADIENT, kit.check_inner_lr_factor),
    (rows_cannot_switch_updates_off, "gating_mlp", RIDGE, kit.check_updates_off),
    (rows_cannot_switch_updates_off, "gating_mlp", GRADIENT, kit.check_updates_off),
    (the_ridge_is_read_on_the_host, "gating_mlp", RIDGE, kit.check_no_host_read),
    (the_ridge_has_no_gradient, "gating_mlp", RIDGE, kit.check_trainable_set),
    (keys_share_one_norm, "gating_mlp", RIDGE, kit.check_rows),
    (keys_are_normalized_over_time, "gating_mlp", GRADIENT, kit.check_causality),
    (a_call_reads_at_scale_one, "gating_mlp", {**RIDGE, "read_scale": 4.0}, kit.check_splits),
    (the_gate_forgets_the_mask, "gating_mlp", {**RIDGE, "success_gate": True}, kit.check_exec_mask),
    (the_gate_knows_the_next_target, "gating_mlp", {**RIDGE, "success_gate": True}, kit.check_causality),
    (a_calls_gate_starts_anew, "gating_mlp", {**GRADIENT, "success_gate": True}, kit.check_splits),
    (a_steps_taps_are_the_other_way_round, "ttt_linear", CONVOLVED, kit.check_splits),
    (the_cache_forgets_the_mask, "ttt_linear", CONVOLVED, kit.check_exec_mask),
    (the_cache_is_memory, "ttt_linear", CONVOLVED, kit.check_updates_off),
    (the_filter_looks_ahead, "ttt_linear", CONVOLVED, kit.check_causality),
    (the_filter_mixes_rows, "ttt_linear", CONVOLVED, kit.check_rows),
    (embeddings_share_one_norm, "ttt_linear", {"chunk": 4, "value": "embedding"}, kit.check_causality),
    (a_streams_later_steps_see_half_the_keys, "ttt_mlp", {"chunk": 4, "inner_steps": 2}, kit.check_splits),
    (a_call_drops_its_velocity, "ttt_mlp", MOMENTUM, kit.check_splits),
    (the_velocity_is_no_memory, "ttt_linear", MOMENTUM, kit.check_memory),
    (the_velocity_is_kept_in_the_hosts_dtype, "ttt_linear", MOMENTUM, kit.check_state_is_float32),
    (a_third_head_has_no_velocity, "ttt_linear", MOMENTUM, kit.check_splits),
]
RAISED: dict[Callable[[Patch], None], type[Exception]] = {
    the_velocity_is_kept_in_the_hosts_dtype: PrecisionError,
    the_ridge_is_read_on_the_host: DataDependentOutputException,
}


@pytest.mark.parametrize(
    ("mutate", "variant", "options", "check"),
    MUTATIONS,
    ids=[f"{mutate.__name__}-{options.get('update', variant)}" for mutate, variant, options, _ in MUTATIONS],
)
def test_the_check_fails(monkeypatch, mutate, variant, options, check):
    cases = [case for case in default_cases(variant, [options]) if runs_by_default(check, case.dtype, first=False)]
    for case in cases:
        check(case)
    for case in cases:
        with monkeypatch.context() as patch:
            mutate(patch)
            try:
                check(case)
            except RAISED.get(mutate, AssertionError):
                return
    pytest.fail(f"{check.__name__} does not notice")


# ---- the compiled step: a line of its source, and what is there instead

COMPILED: dict[str, tuple[str, str, dict[str, Any], Check]] = {  # of gating_mlp
    "more ridge": (
        "square(own, key.size(0)) + ridge -", "square(own, key.size(0)) + 2 * ridge -", RIDGE, kit.check_splits
    ),
    "adds the answer": ("+ channel] -= answer[channel];", "+ channel] += answer[channel];", GRADIENT, kit.check_splits),
    "keeps its factor": ("if (ends && state_.factor)", "if (false)", RIDGE, kit.check_every_prefix),
    "the gate forgets the mask": (
        "    const T* target = row_of<T>(token.target, b);\n    T* answer = row_of<T>(given, b);\n",
        "    const T* target = row_of<T>(token.target, b);\n    T* answer = row_of<T>(given, b);\n"
        "    if (gate) row.remember_answer(answer, 0, gate->taps);\n",
        {**RIDGE, "success_gate": True},
        kit.check_exec_mask,
    ),
}  # fmt: skip


COMPILED_RIDGE: dict[str, tuple[str, str, dict[str, Any], Check]] = {
    "the prior always comes back in one coordinate": (
        "(counters.coordinate[row] + 1) % key", "counters.coordinate[row]", {"decay": 0.2}, kit.check_splits
    ),
    "reads the solution one token early": (
        "counters.position[row] + 1 == chunk);", "counters.position[row] + 2 == chunk);", {}, kit.check_every_prefix
    ),
    "writes to idle rows": ("if (!token.active || token.active[row])", "if (true)", {}, kit.check_exec_mask),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "name"),
    [*(("gating_mlp", name) for name in COMPILED), *(("ttt_ridge", name) for name in COMPILED_RIDGE)],
)
def test_the_check_fails_a_compiled_step(monkeypatch, tmp_path, variant, name):
    compiled, mutants = (gating, COMPILED) if variant == "gating_mlp" else (ridge, COMPILED_RIDGE)
    line, instead, options, check = mutants[name]
    cases = default_cases(variant, [{"chunk": 4, **options}], compiled_step=True)
    for case in cases:
        check(case)
    was, library = compiled.LIBRARY, f"{variant}_mutant_{list(mutants).index(name)}"
    changed, copied = 0, []
    for path in (was.source, *was.headers):
        source = path.read_text(encoding="utf-8")
        changed += source.count(line)
        copied.append(tmp_path / path.name)
        copied[-1].write_text(source.replace(line, instead).replace(was.name, library), encoding="utf-8")
    assert changed == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mutant = replace(was, name=library, source=copied[0], headers=tuple(copied[1:]))
    monkeypatch.setattr(compiled, "LIBRARY", mutant)
    monkeypatch.setattr(compiled, "operation", functools.cache(compiled.operation.__wrapped__))
    caught = 0
    for case in cases:
        try:
            check(case)
        except AssertionError:
            caught += 1
    assert caught
