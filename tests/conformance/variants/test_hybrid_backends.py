"""The option ``backend`` of the TTT layers: every backend computes the same, and what cannot be had raises."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from dataclasses import replace

import pytest
import torch

from moshi_ttt import TTTLinearConfig, TTTMLPConfig
from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import BackendError, ConfigError
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.testing import Shape, conformance_tests, error
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.common.backends import log_once
from moshi_ttt.plugins.hybrid.backends import STEP, TRAIN, HybridUse

VARIANTS = [("ttt_linear", {}), ("ttt_mlp", {"expansion": 3}), ("ttt_multilayer", {"hidden_dims": (6, 18, 5)})]

# The naive form takes every token by itself, so the grid is for the full suite.
test_cpp_backend = conformance_tests(
    "ttt_mlp", {"chunk": 4, "expansion": 2, "backend": "cpp"}, shapes=(Shape(dim=16, heads=2, batch=2),)
)
test_naive_backend = pytest.mark.exhaustive(
    conformance_tests(
        "ttt_mlp", {"chunk": 2, "expansion": 1, "backend": "naive"}, shapes=(Shape(dim=16, heads=2, batch=2),)
    )
)


def case_of(variant, options, dtype=torch.float64, **more):
    (found,) = (case for case in default_cases(variant, [{"chunk": 4, **options}]) if case.dtype == dtype)
    return replace(found.at(shape=Shape(dim=16, heads=2, batch=3)), **more)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_every_backend_of_a_call_is_that_of_tensor_operations(variant, options, causal):
    """From a state with rows out of step, with a token that is not finite and a row without updates; gradients."""
    found = []
    for backend in ("torch", "naive", "cpp"):
        case = case_of(variant, {**options, "causal": causal, "backend": backend})
        block = case.block()
        x = case.inputs(11)
        x[0, 2] = math.nan
        state = None
        if causal:
            context = case.context(x[:, :7], exec_mask=torch.tensor([True, False, True]))
            state = block(x[:, :7], block.allocate_state(3), context)[1]
            state = {name: tensor.detach() for name, tensor in state.items()}
        updated = torch.tensor([True, True, False])
        y, after = block(x[:, 5:], state, case.context(x[:, 5:], updates=updated))
        (y.square().sum() + sum(t.square().sum() for t in after.values() if t.requires_grad)).backward()
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), **after, **gradients})
        assert block.backends_in_use()["train"] == (backend,)
    assert len(found[0]) > 20
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(error(other[name], found[0][name]) < 1e-10 for name in found[0])


@pytest.mark.parametrize(("variant", "options"), VARIANTS)
def test_a_step_by_the_definition_is_that_of_tensor_operations(variant, options):
    blocks = [case_of(variant, {**options, "backend": name}).block() for name in ("torch", "naive")]
    x = case_of(variant, options).inputs(11)
    states = [block.allocate_state(3) for block in blocks]
    for t in range(11):
        now, rows = x[:, t : t + 1], torch.tensor([True, t % 3 > 0, True])
        context = BlockContext(input_embeddings=now, exec_mask=rows, updates=torch.tensor([True, True, t > 4]))
        y = [block.step(now, state, context) for block, state in zip(blocks, states, strict=True)]
        assert error(y[1][rows], y[0][rows]) < 1e-10
        assert all(error(states[1][name], tensor) < 1e-10 for name, tensor in states[0].items())


@pytest.mark.exhaustive  # torch compiles for a dozen seconds; test_hybrid.py traces blocks whole
def test_compiled_by_torch_it_is_the_same_with_second_derivatives():
    case = case_of("ttt_mlp", {"expansion": 1, "backend": {"train": "compile"}})
    other = case_of("ttt_mlp", {"expansion": 1})
    x = case.inputs(9).requires_grad_()
    found = []
    for block in (case.block(), other.block()):
        y = block(x)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        found.append((y, gradient, second))
    assert case.block().backends_in_use() == {}
    assert all(error(a, b) < 1e-10 for a, b in zip(*found, strict=True))


# ---- what is asked for


def test_a_name_is_for_the_operations_that_have_it():
    assert dict(TTTMLPConfig(backend="compile").backends()) == {"train": "compile", "step": "auto", "tune": False}
    assert dict(TTTMLPConfig(backend="cpp").backends()) == {"train": "cpp", "step": "cpp", "tune": False}
    assert dict(TTTMLPConfig(backend="naive").backends()) == {"train": "naive", "step": "naive", "tune": False}
    assert dict(TTTMLPConfig(backend={"step": "torch"}).backends()) == {"train": "auto", "step": "torch", "tune": False}
    assert dict(TTTLinearConfig().backends()) == {"train": "auto", "step": "auto", "tune": False}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cuda", "'auto', 'naive', 'torch', 'compile', 'cpp' or 'triton'"),
        ({"step": "compile"}, "backend: step = 'compile': Input should be 'auto', 'naive', 'torch', 'cpp' or 'triton'"),
        ({"stream": "cpp"}, "backend: unknown key 'stream'. Did you mean 'step'"),
        (True, "backend cannot be true"),
    ],
    ids=str,
)
def test_a_backend_that_does_not_exist_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        parse_block({"variant": "ttt_mlp", "backend": given})


def test_the_kernels_are_for_a_state_in_float32_or_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = case_of("ttt_mlp", {"backend": "triton", "chunk": 16}, torch.float64, policy=UNIFORM)
    with pytest.raises(BackendError, match=r"its state is torch.float64; the kernels are for float32 and bfloat16"):
        case.block()(case.inputs(3))
    with pytest.raises(BackendError, match=r"torch.float64; the kernels of a step are for float32 and bfloat16"):
        case.block().step(case.inputs(1), case.block().allocate_state(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "naive", "momentum": 0.9}, r"backend: naive was asked for a training call.*it has momentum: 0\.9"),
        ({"backend": "naive", "inner_steps": 2, "inner_norm": False}, "inner_norm: False, inner_steps: 2"),
        ({"backend": "cpp", "momentum": 0.9}, r"backend: cpp was asked for a training call.*it has momentum: 0\.9"),
        (
            {"backend": "triton", "chunk": 16},
            r"its device is cpu.*Here, it can be auto, (cpp, )?torch.*\{train: auto\}",
        ),
    ],
    ids=str,
)
def test_a_call_that_a_named_backend_does_not_serve_raises(options, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = case_of("ttt_mlp", options, torch.float32 if options["backend"] == "triton" else torch.float64)
    with pytest.raises(BackendError, match=said):
        case.block()(case.inputs(3))


def test_a_step_that_a_named_backend_does_not_serve_raises():
    case = case_of("ttt_mlp", {"backend": {"step": "cpp"}, "causal": True, "inner_steps": 3})
    block = case.block()
    with pytest.raises(BackendError, match=r"backend: cpp was asked for a streamed step.*inner_steps: 3.*\{step: auto"):
        case.step(block, case.inputs(1), block.allocate_state(3))
    case.call(block, case.inputs(2))  # the other operation has one


def test_what_torch_compiles_is_the_torch_form_alone():
    naive, plain = (case_of("ttt_linear", {"backend": name}).block() for name in ("naive", "auto"))
    with pytest.raises(BackendError, match=r"torch\.compile compiles tensor operations alone"):
        naive.compile_compute()
    plain.compile_compute()
    with pytest.raises(BackendError, match=r"torch\.compile compiles tensor operations alone"):
        plain.use_backend("train", "naive")


# ---- what auto takes


def use_of(widths, device="cpu", dtype=torch.float32, **options):
    return HybridUse(TTTMLPConfig(**options), widths, torch.device(device), dtype)


@pytest.mark.parametrize("operation", [TRAIN, STEP], ids=["train", "step"])
def test_auto_is_cpp_on_a_cpu_for_what_is_no_toy(operation):
    assert operation.choose("auto", use_of((128, 128)), "here").name == "cpp"
    assert operation.choose("auto", use_of((64, 256, 64)), "here").name == "torch"
    assert operation.choose("auto", use_of((128, 128), momentum=0.9), "here").name == "torch"
    assert operation.reasons(use_of((128, 128), dtype=torch.bfloat16))["cpp"].startswith("its state is torch.bfloat16")
    assert operation.reasons(use_of((128, 128), device="meta"))["cpp"].startswith("its state is torch.float32 on meta")


@pytest.mark.parametrize("operation", [TRAIN, STEP], ids=["train", "step"])
def test_without_a_compiler_auto_is_torch_and_says_why(operation, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moshi_ttt.backends"):
        assert operation.choose("auto", use_of((128, 128)), "here").name == "torch"
    assert "no-compiler was not found. Install g++" in caplog.text
    with pytest.raises(BackendError, match=r"backend: cpp was asked for.*no-compiler was not found"):
        operation.choose("cpp", use_of((128, 128)), "here")


# ---- what keeps it


def test_a_block_shows_what_it_computes_with():
    case = case_of("ttt_linear", {"backend": {"step": "naive"}})
    block = case.block()
    assert "backend={step: naive}" in repr(block)
    case.call(block, case.inputs(2))
    assert "backend={train: torch}" in repr(block)
    assert "backend" not in repr(case_of("ttt_linear", {}).block())


def test_copies_choose_again(monkeypatch):
    block = case_of("ttt_linear", {"backend": "naive"}).block()
    case = case_of("ttt_linear", {})
    case.call(block, case.inputs(2))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.backends_in_use() == {}
        case.call(other, case.inputs(2))
        assert other.backends_in_use() == {"train": ("naive",)}


def test_adapters_do_not_keep_it(tmp_path):
    import moshi_ttt

    def model(**options):
        made = moshi_ttt.load_model("builtin:tiny")
        return made, moshi_ttt.inject(made, TTTLinearConfig(layers="last:1", chunk=4, **options))

    _, first = model(backend="naive")
    save_adapter(first, tmp_path / "adapter")
    manifest = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert "backend" not in manifest["sites"][0]["config"]
    loaded = load_adapter(moshi_ttt.load_model("builtin:tiny"), tmp_path / "adapter")
    assert [block.config.backend for block in loaded.blocks.values()] == ["auto"]
