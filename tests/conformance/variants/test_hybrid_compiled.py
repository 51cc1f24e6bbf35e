"""The compiled step of the hybrid layer: the same results and state, step by step, as by tensor operations.

That a stream equals a call is the kit's, in test_conformance.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.state import clone
from moshi_ttt.core.testing import Shape, error
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.common import instructions
from moshi_ttt.plugins.hybrid import compiled

VARIANTS = [("ttt_linear", {}), ("ttt_mlp", {"expansion": 3}), ("ttt_multilayer", {"hidden_dims": (6, 18, 5)})]
STEPS = 15


def case_of(variant, options, dtype=torch.float64, **more):
    """Heads of 20: no multiple of what the loops take at a time."""
    (found,) = (case for case in default_cases(variant, [{"chunk": 4, **options}]) if case.dtype == dtype)
    return replace(found.at(shape=Shape(dim=40, heads=2, batch=3)), **more)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_every_step_is_that_of_tensor_operations(variant, options, dtype, limit):
    """Rows out of step, a token that is not finite, updates that are disabled in a row, a reset."""
    plain = case_of(variant, options, dtype).block()
    fast = case_of(variant, options, dtype, compiled_step=True).block()
    x = case_of(variant, options, dtype).inputs(STEPS)
    x[0, 6] = math.nan
    states = [plain.allocate_state(3), fast.allocate_state(3)]
    generator = torch.Generator().manual_seed(0)
    for t in range(STEPS):
        active = torch.rand(3, generator=generator) < 0.8
        updated = torch.rand(3, generator=generator) < 0.7
        if t == 6:
            active[0] = updated[0] = True
        now = x[:, t : t + 1]
        context = BlockContext(input_embeddings=now, exec_mask=active, updates=updated)
        expected, found = plain.step(now, states[0], context), fast.step(now, states[1], context)
        rows = active & now.isfinite().all(-1)[:, 0]
        assert error(found[rows], expected[rows]) < limit
        assert all(error(states[1][name], states[0][name]) < limit for name in states[0])
        if t == 8:
            for block, state in zip((plain, fast), states, strict=True):
                block.reset_state(state, torch.tensor([False, True, False]))
    assert states[0]["skipped"].tolist() == states[1]["skipped"].tolist() == [1, 0, 0]


def test_idle_rows_keep_their_bits():
    block = case_of("ttt_mlp", {}, torch.float32, compiled_step=True).block()
    x = case_of("ttt_mlp", {}, torch.float32).inputs(7)
    state = block.allocate_state(3)
    for t in range(6):
        block.step(x[:, t : t + 1], state, BlockContext(input_embeddings=x[:, t : t + 1]))
    before = clone(state)
    context = BlockContext(input_embeddings=x[:, 6:], exec_mask=torch.tensor([True, False, False]))
    block.step(x[:, 6:] * math.nan, state, context)
    assert all(torch.equal(state[name][1:], before[name][1:]) for name in state)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_change_no_bit(count):
    found = []
    for threads in (1, count):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            block = case_of("ttt_mlp", {}, torch.float32, compiled_step=True).block()
            x, state = case_of("ttt_mlp", {}, torch.float32).inputs(6), block.allocate_state(3)
            found.append([block.step(x[:, t : t + 1], state) for t in range(6)] + list(state.values()))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 0.9}, r"momentum: 0\.9"),
        ({"learned_momentum": True}, "momentum"),
        ({"inner_steps": 2}, "inner_steps: 2"),
        ({"inner_norm": False}, "inner_norm: False"),
        ({"causal": False}, "causal: False"),
    ],
    ids=str,
)
def test_options_that_it_does_not_have_are_refused(options, said):
    with pytest.raises(
        ConfigError, match=f"backend: cpp was asked for a streamed step.*it has {said}.*Here, it can be auto, torch"
    ):
        case_of("ttt_mlp", options).block().compile_step()


def test_another_device_and_dtype_are_refused():
    with pytest.raises(ConfigError, match=r"state is torch\.float64 on meta; the compiled step is for float32"):
        case_of("ttt_linear", {}).block(device="meta").compile_step()
    with pytest.raises(ConfigError, match=r"state is torch\.bfloat16 on cpu"):
        case_of("ttt_linear", {}, torch.bfloat16, policy=UNIFORM).block().compile_step()


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_chunk_is_refused(position):
    block, x = case_of("ttt_linear", {}, compiled_step=True).block(), case_of("ttt_linear", {}).inputs(1)
    state = block.allocate_state(3)
    state["position"][1] = position
    before = clone(state)
    with pytest.raises(RuntimeError, match=f"'position' is {position} in row 1, and a chunk has 4 tokens"):
        block.step(x, state)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_state_of_another_shape_is_refused():
    block, x = case_of("ttt_linear", {}, compiled_step=True).block(), case_of("ttt_linear", {}).inputs(1)
    state = block.allocate_state(3)
    state["gradient.0"] = state["gradient.0"][:, :, :3].contiguous()
    with pytest.raises(RuntimeError, match=r"'gradient\.0' is .*Take the state from the block's allocate_state"):
        block.step(x, state)


def test_another_processor_is_another_build(monkeypatch, tmp_path):
    """A home folder may be shared by machines whose instructions differ."""
    before = compiled.LIBRARY.version()
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu sse2 other\n", encoding="utf-8")
    assert compiled.LIBRARY.version() != before


def test_where_a_build_fails_the_message_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(compiled, "operation", compiled.operation.__wrapped__)
    block = case_of("ttt_linear", {}).block()
    with pytest.raises(ConfigError, match=r"compiled step of the hybrid layer cannot be built: false ended with 1"):
        block.compile_step()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    block.step(case_of("ttt_linear", {}).inputs(1), block.allocate_state(3))
