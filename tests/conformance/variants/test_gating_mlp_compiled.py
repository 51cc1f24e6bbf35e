"""The compiled step of in-place TTT: the same state, step by step, as by tensor operations; what it refuses.

That it equals the definition is in test_gating_mlp_streaming.py, the kit's rules in test_conformance.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.errors import ConfigError, ContextError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.common.block_backends import BlockWithBackends
from moshi_ttt.plugins.gating_mlp import compiled
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from tests.unit.plugins.gating import DIM, build, draw

CORRECTIONS = [
    {"update": "gradient", "lr": 0.2, "decay": 0.2},
    {"update": "gradient", "keys": "unit", "clip": 0.6, "success_gate": True, "learned_lr": True},
    {"update": "ridge"},
    {"update": "ridge", "lr": 1.0, "learned_lr": True, "keys": "unit", "target_norm": True, "success_gate": True},
    {"update": "ridge", "decay": 0.2, "clip": 0.6, "success_gate": True, "read_scale": 4.0},
]


@pytest.mark.parametrize(
    "options",
    [{}, {"decay": 0.2}, {"clip": 0.6, "learned_lr": True}, {"success_gate": True}, *CORRECTIONS],
    ids=str,
)
@pytest.mark.parametrize(("chunk", "kernel", "padding"), [(1, 3, "centered"), (5, 12, "causal"), (16, 5, "centered")])
def test_every_part_of_the_state_is_the_same_after_every_step(chunk, kernel, padding, options):
    """Rows that stop and start, tokens that teach nothing, tokens that are not finite: each row at its own place."""
    settings = {"chunk": chunk, "conv_kernel": kernel, "padding": padding, **options}
    plain, fast = build(**settings), build(compiled=True, **settings)
    length = 4 * chunk + 3
    x, target = draw(4, length, DIM), draw(4, length, DIM, seed=2)
    chance = torch.rand(length, 5, generator=torch.Generator().manual_seed(3))
    active = chance[:, :4] < 0.7
    x[1, chunk], active[chunk, 1] = torch.inf, True
    expected, state = plain.allocate_state(4), fast.allocate_state(4)
    for t in range(length):
        # Enabled where the input is not finite: nothing is counted in a chunk without an enabled token.
        token, updates = x[:, t : t + 1], (chance[t, :4] + chance[t, 4] < 1.6) | (t == chunk)
        context = BlockContext(input_embeddings=target[:, t : t + 1], exec_mask=active[t], updates=updates)
        outputs = plain.step(token, expected, context), fast.step(token, state, context)
        assert error(*(y.nan_to_num(0, 0, 0) for y in outputs)) < 1e-12
        assert {name for name in expected if error(state[name], expected[name]) > 1e-12} == set(), t
    assert len(expected["position"].unique()) > 1 or chunk == 1, "the rows went apart"
    assert (expected["skipped"] > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("options", CORRECTIONS[1:], ids=str)
def test_float32_differs_by_rounding(options):
    """From tensor operations in float32, no further than those are from float64: 2 rows, 6 chunks of 16."""
    x, target = draw(2, 99, DIM), draw(2, 99, DIM, seed=2)
    outputs, states = [], []
    for dtype, by in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        block = build(chunk=16, dtype=dtype, compiled=by, mlp=shared_mlp(dtype), **options)
        state = block.allocate_state(2)
        tokens = zip(x.to(dtype).split(1, 1), target.to(dtype).split(1, 1), strict=True)
        outputs.append(
            torch.cat([block.step(token, state, BlockContext(input_embeddings=given)) for token, given in tokens], 1)
        )
        states.append(state)
    exact, plain, fast = outputs
    bound = max(2 * error(plain, exact), 1e-6)
    assert bound < 1e-4
    assert error(fast, exact) < bound
    for name, tensor in states[0].items():
        found = error(states[2][name], tensor)
        assert found <= max(2 * error(states[1][name], tensor), 1e-5), name


def shared_mlp(dtype):
    """The same numbers in every dtype."""
    mlp = ToyMLP(DIM, dtype, "cpu")
    mlp.load_state_dict(ToyMLP(DIM, torch.float64, "cpu").state_dict())
    return mlp


@pytest.mark.parametrize("options", [{}, *CORRECTIONS], ids=str)
def test_a_row_is_not_touched_by_another_that_is_not_finite(options):
    block = build(compiled=True, **options)
    x = draw(3, 9, DIM)
    spoiled = x.clone()
    spoiled[1] = torch.nan
    streams = []
    for given in (x, spoiled):
        state = block.allocate_state(3)
        y = [block.step(t, state, BlockContext(input_embeddings=t)) for t in given.split(1, 1)]
        streams.append((torch.cat(y, dim=1), state))
    (clean, before), (dirty, after) = streams
    assert torch.equal(clean[[0, 2]], dirty[[0, 2]])
    assert all(torch.equal(before[name][[0, 2]], after[name][[0, 2]]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("options", [{}, *CORRECTIONS], ids=str)
def test_a_compiled_step_goes_on_where_tensor_operations_stopped(options):
    block, x = build(**options), draw(2, 11, DIM)
    state = block.allocate_state(2)
    for t in x[:, :6].split(1, 1):
        block.step(t, state, BlockContext(input_embeddings=t))
    block.compile_step()
    y = torch.cat([block.step(t, state, BlockContext(input_embeddings=t)) for t in x[:, 6:].split(1, 1)], dim=1)
    whole, after = build(**options)(x, None, BlockContext(input_embeddings=x))
    assert error(y, whole[:, 6:]) < 1e-11
    assert all(error(state[name], tensor) < 1e-11 for name, tensor in after.items())


def test_inputs_and_masks_need_not_be_contiguous():
    block, x = build(compiled=True), draw(2, DIM, 9).mT
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, ::3] = False
    streams = []
    for copied in (False, True):
        state = block.allocate_state(2)
        for t in range(9):
            token, active = x[:, t : t + 1], mask[:, t]
            assert not token.is_contiguous()
            assert not active.is_contiguous()
            if copied:
                token, active = token.contiguous(), active.contiguous()
            block.step(token, state, BlockContext(input_embeddings=token, exec_mask=active))
        streams.append(state)
    assert all(torch.equal(streams[0][name], streams[1][name]) for name in streams[0])


@pytest.mark.parametrize("name", ["delta", "keys", "values", "open", "factor", "answer", "scores"])
def test_a_state_of_another_shape_is_refused_and_stays_as_it_was(name):
    block, x = build(compiled=True, update="ridge", success_gate=True), draw(2, 1, DIM)
    state = block.allocate_state(2)
    state[name] = torch.cat([state[name]] * 2, dim=-1)[..., :-1].contiguous()
    before = {part: tensor.clone() for part, tensor in state.items()}
    with pytest.raises(RuntimeError, match=rf"'{name}' has shape .* Take the state from the block's allocate_state"):
        block.step(x, state, BlockContext(input_embeddings=x))
    assert all(torch.equal(state[part], tensor) for part, tensor in before.items())


EVERY_PART = {"clip": 1.0, "update": "ridge", "success_gate": True}


@pytest.mark.parametrize("name", build(**EVERY_PART).init_state(1))
def test_rows_that_share_storage_are_refused(name):
    block, x = build(compiled=True, **EVERY_PART), draw(2, 1, DIM)
    state = block.allocate_state(2)
    state[name] = state[name][:1].expand(2, *state[name].shape[1:])
    with pytest.raises(ContextError, match=f"'{name}' is not contiguous"):
        block.step(x, state, BlockContext(input_embeddings=x))


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_chunk_is_refused(position):
    block, x = build(compiled=True, chunk=4), draw(2, 1, DIM)
    state = block.allocate_state(2)
    state["position"][1] = position
    with pytest.raises(RuntimeError, match=f"'position' is {position} in row 1, and a chunk has 4 tokens"):
        block.step(x, state, BlockContext(input_embeddings=x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 1.0}, "has 'norm' where updates are clipped"),
        ({"update": "ridge"}, "has 'factor' where update is ridge"),
        ({"success_gate": True}, "has 'answer' where there is a success gate"),
    ],
    ids=str,
)
def test_a_state_is_refused_by_a_block_without_its_option(options, said):
    x = draw(2, 1, DIM)
    with_it, without = (options, {}), ({}, options)
    for of_the_state, of_the_block in (with_it, without):
        state = build(**of_the_state).allocate_state(2)
        with pytest.raises(RuntimeError, match=said):
            build(compiled=True, **of_the_block).step(x, state, BlockContext(input_embeddings=x))


def test_a_change_of_the_header_is_another_build(tmp_path):
    header, *others = compiled.LIBRARY.headers
    changed = tmp_path / "corrections.h"
    changed.write_text(header.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert replace(compiled.LIBRARY, headers=(changed, *others)).version() != compiled.LIBRARY.version()


def test_a_state_in_bfloat16_is_refused():
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=torch.bfloat16,
        format=SequenceFormat(), mlp=ToyMLP(DIM, torch.bfloat16, "cpu"),
    )  # fmt: skip
    block = GatingMLP(GatingMLPConfig(chunk=4), info, UNIFORM.roles(torch.bfloat16))
    with pytest.raises(ConfigError, match=r"state is torch\.bfloat16 on cpu; the compiled step is for float32"):
        block.compile_step()


def test_a_block_on_another_device_is_refused():
    (case, *_) = default_cases("gating_mlp", [{"chunk": 4}])
    with pytest.raises(ConfigError, match=r"state is torch\.float64 on meta; the compiled step is for float32"):
        case.block(device="meta").compile_step()


def test_a_variant_without_a_compiled_step_says_so(monkeypatch):
    (case, *_) = default_cases("gating_mlp", [{"chunk": 4}])
    monkeypatch.setattr(BlockWithBackends, "compile_step", SequenceBlock.compile_step)
    with pytest.raises(ConfigError, match=r"has no compiled step\. Stream without compile_step"):
        case.block().compile_step()


def refusal(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "operation", compiled.operation.__wrapped__)
    block = build()
    with pytest.raises(ConfigError, match=r"cannot be (built|had)") as caught:
        block.compile_step()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [], "nothing half-built is left"
    state, x = block.allocate_state(1), draw(1, 1, DIM)
    block.step(x, state, BlockContext(input_embeddings=x))
    assert state["position"].tolist() == [1], "the block streams as before"
    return str(caught.value)


def test_without_a_compiler_the_message_says_what_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    message = refusal(monkeypatch, tmp_path)
    assert f"The C++ compiler {tmp_path / 'no-compiler'} was not found. Install g++, or name another" in message
    assert "Here, it can be auto, torch." in message


def test_what_the_compiler_says_is_shown(monkeypatch, tmp_path):
    broken = tmp_path / "step.cpp"
    broken.write_text("int step( {", encoding="utf-8")
    monkeypatch.setattr(compiled, "LIBRARY", replace(compiled.LIBRARY, source=broken, headers=()))
    message = refusal(monkeypatch, tmp_path)
    assert "ended with 1: " in message
    assert "It needs a C++ compiler, g++ or the one that CXX names" in message
    assert "step.cpp:1" in message


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    message = refusal(monkeypatch, tmp_path)
    assert f"{tmp_path / 'cache'} is not a folder that can be written. Name another one in XDG_CACHE_HOME" in message


USE = """
from moshi_ttt.plugins.gating_mlp import compiled
print(compiled.operation())
"""


@pytest.mark.exhaustive  # the processes of the suite itself build it once and find it
def test_it_is_built_once_and_then_found(tmp_path):
    """Two processes with one cache: the second takes what the first built, and builds nothing (it has no compiler)."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    first = use(environment)
    (library,) = tmp_path.rglob("*.so")
    assert list(library.parent.iterdir()) == [library], "the folder of the build is gone"
    written = library.stat().st_mtime_ns
    assert use({**environment, "CXX": "/no/such/compiler"}) == first
    assert library.stat().st_mtime_ns == written


def use(environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-c", USE], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
