"""What makes a streamed step, and what is refused; of the option ``backend``, that of ``ttt_ridge`` and ``gating_mlp``.

``test_hybrid_backends`` has the option of the TTT layer.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch

from moshi_ttt import GatingMLPConfig, TTTRidgeConfig
from moshi_ttt.core.adapter import load_adapter, save_adapter
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import BackendError, ConfigError
from moshi_ttt.core.precision import UNIFORM
from moshi_ttt.core.testing import error
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.common.backend_options import step_backend
from moshi_ttt.plugins.common.backends import log_once
from moshi_ttt.plugins.common.block_backends import LEAST_STATE, StepUse
from moshi_ttt.plugins.gating_mlp.backends import STEP as GATING
from moshi_ttt.plugins.ttt_ridge.backends import STEP as RIDGE

VARIANTS = ["ttt_ridge", "gating_mlp"]
WIDE = {"ttt_ridge": {"heads": 1, "key_width": 1024}, "gating_mlp": {"chunk": 2**14}}
"""Small blocks with a large state."""
both = pytest.mark.parametrize("variant", VARIANTS)


def case_of(variant, dtype=torch.float64, **options):
    (found,) = (case for case in default_cases(variant, [{"chunk": 4, **options}]) if case.dtype == dtype)
    return found


def used(case):
    """The backend of the step of a case's block, after a streamed token."""
    block = case.block()
    case.step(block, case.inputs(1), block.allocate_state(case.shape.batch))
    return block.backends_in_use()["step"]


# ---- what auto takes


@both
def test_auto_is_cpp_for_a_large_state_and_tensor_operations_for_a_toy(variant):
    assert used(case_of(variant, torch.float32, **WIDE[variant])) == ("cpp",)
    assert used(case_of(variant, torch.float32)) == ("torch",)
    assert used(case_of(variant, backend="cpp")) == ("cpp",)
    assert used(case_of(variant, backend={"step": "torch"}, **WIDE[variant])) == ("torch",)


@pytest.mark.parametrize("operation", [RIDGE, GATING], ids=VARIANTS)
def test_auto_begins_at_four_mebibytes(operation):
    def taken(numbers, device="cpu", dtype=torch.float32):
        return operation.choose("auto", StepUse(torch.device(device), dtype, numbers), "here").name

    assert (taken(LEAST_STATE), taken(LEAST_STATE - 1)) == ("cpp", "torch")
    assert taken(LEAST_STATE, dtype=torch.float64) == "cpp"
    assert taken(LEAST_STATE, device="meta") == taken(LEAST_STATE, dtype=torch.bfloat16) == "torch"


def test_what_is_large_is_moshi_7b_and_the_benchmark_and_not_the_tiny_moshi():
    from moshi_ttt import default_registry
    from moshi_ttt.core.block import Site, SiteInfo, SiteKind
    from moshi_ttt.core.format import SequenceFormat
    from moshi_ttt.core.precision import FP32_STATE
    from moshi_ttt.hosts.moshi.tiny import memory_adapter

    def numbers(variant, dim, hidden, **options):
        kind = SiteKind.FEED_FORWARD if variant == "gating_mlp" else SiteKind.SEQUENCE
        info = SiteInfo(
            site=Site(0, kind), dim=dim, num_heads=max(1, dim // 128), device=torch.device("meta"), dtype=torch.float32,
            format=SequenceFormat(), mlp=mlp_of(dim, hidden) if variant == "gating_mlp" else None,
        )  # fmt: skip
        config = parse_block({"variant": variant, **options})
        block = default_registry().block(variant).factory(config, info, FP32_STATE.roles(torch.float32))
        return block._backend_use(torch.device("cpu")).numbers

    assert numbers("ttt_ridge", 4096, 11264) >= LEAST_STATE
    assert numbers("gating_mlp", 4096, 11264) >= LEAST_STATE
    assert numbers("gating_mlp", 1024, 2816) >= LEAST_STATE
    manifest = json.loads((memory_adapter() / "adapter.json").read_text())
    for site in manifest["sites"]:
        options = {key: value for key, value in site["config"].items() if key != "variant"}
        assert numbers(site["config"]["variant"], 256, 704, **options) < LEAST_STATE
    assert numbers("gating_mlp", 256, 704) < LEAST_STATE


def mlp_of(dim, hidden):
    from torch import nn

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_in = nn.Linear(dim, 2 * hidden, bias=False, device="meta")
            self.linear_out = nn.Linear(hidden, dim, bias=False, device="meta")
            self.activation = nn.functional.silu

    return Gated()


@pytest.mark.parametrize("operation", [RIDGE, GATING], ids=VARIANTS)
def test_without_a_compiler_auto_is_torch_and_says_why_once(operation, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    use = StepUse(torch.device("cpu"), torch.float32, LEAST_STATE)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moshi_ttt.backends"):
        assert [operation.choose("auto", use, "here").name for _ in range(2)] == ["torch", "torch"]
    assert caplog.text.count("no-compiler was not found. Install g++") == 1
    with pytest.raises(BackendError, match=r"backend: cpp was asked for a streamed step.*no-compiler was not found"):
        operation.choose("cpp", use, "here")


@both
def test_a_small_state_is_said_too(variant, caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="moshi_ttt.backends"):
        used(case_of(variant))
    assert "backend auto, a streamed step: not cpp: its state has " in caplog.text
    assert "and C++ is built for 1,048,576 or more; ask for it by name" in caplog.text


# ---- what is asked for by name


@both
@pytest.mark.parametrize("name", ["naive", "compile", "triton"])
@pytest.mark.parametrize("for_step", [False, True])
def test_a_backend_that_a_step_does_not_have_is_refused(variant, name, for_step):
    case = case_of(variant, backend={"step": name} if for_step else name)
    with pytest.raises(
        BackendError,
        match=rf"backend: {name} was asked for a streamed step, and cannot be had: there is none\. Here, it can be "
        r"auto, (cpp, )?torch\. Set one of these, as in backend: \{step: auto\}",
    ):
        case.block()


@both
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cuda", "'auto', 'naive', 'torch', 'compile', 'cpp' or 'triton'"),
        ({"train": "cpp"}, "backend: unknown key 'train'"),
        (True, "backend cannot be true"),
    ],
    ids=str,
)
def test_a_word_that_is_no_backend_is_refused(variant, given, said):
    with pytest.raises(ConfigError, match=said):
        parse_block({"variant": variant, "backend": given})


@both
def test_cpp_by_name_on_another_device_or_dtype_raises_when_a_state_is_allocated(variant):
    meta = case_of(variant, backend="cpp").block(device="meta")
    with pytest.raises(BackendError, match=r"backend: cpp was asked for a streamed step.*float64 on meta"):
        meta.allocate_state(3)
    if variant == "gating_mlp":  # ttt_ridge takes no state of few digits
        case = case_of(variant, torch.bfloat16, backend="cpp").at(policy=UNIFORM)
        with pytest.raises(
            BackendError, match=r"its state is torch\.bfloat16 on cpu; the compiled step is for float32"
        ):
            case.block().allocate_state(2)


@pytest.mark.parametrize("variant", [*VARIANTS, "ttt_linear"])
def test_it_is_chosen_when_a_state_is_allocated_and_no_step_waits_for_it(variant, monkeypatch):
    case = case_of(variant)
    block = case.block()
    state = block.allocate_state(3)
    assert block.backends_in_use() == {"step": ("torch",)}
    monkeypatch.setattr(block, "_choose", lambda *given: pytest.fail("a step chose a backend"))
    case.step(block, case.inputs(1), state)


@both
def test_an_operation_that_has_no_backends_is_refused(variant):
    with pytest.raises(BackendError, match=r"'train' is not an operation with backends; \w+ has step\."):
        case_of(variant).block().use_backend("train", "cpp")


@both
def test_a_refusal_changes_nothing(variant):
    case = case_of(variant)
    block = case.block()
    with pytest.raises(BackendError, match="naive"):
        block.use_backend("step", "naive")
    case.step(block, case.inputs(1), block.allocate_state(3))
    assert block.backends_in_use() == {"step": ("torch",)}


# ---- what keeps it


def test_one_name_or_one_for_the_step():
    assert step_backend(TTTRidgeConfig(backend="cpp").backend) == "cpp"
    assert step_backend(GatingMLPConfig(backend={"step": "torch"}).backend) == "torch"
    assert step_backend(GatingMLPConfig().backend) == step_backend(TTTRidgeConfig(backend={}).backend) == "auto"


@both
def test_both_make_the_same_stream(variant):
    streams = []
    for name in ("torch", "cpp"):
        case = case_of(variant, backend=name)
        streams.append(case.stream(case.block(), case.inputs(11).split(1, 1)))
    (y, state), (other, others) = streams
    assert error(other, y) < 1e-11
    assert all(error(others[name], part) < 1e-11 for name, part in state.items())


@both
def test_a_block_shows_it_and_a_copy_chooses_again(variant):
    case = case_of(variant, backend="cpp")
    block = case.block()
    assert "backend={step: cpp}" in repr(block)
    assert "backend" not in repr(case_of(variant).block())
    case.step(block, case.inputs(1), block.allocate_state(3))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.backends_in_use() == {}
        case.step(other, case.inputs(1), other.allocate_state(3))
        assert other.backends_in_use() == {"step": ("cpp",)}


@pytest.mark.parametrize("config", [TTTRidgeConfig, GatingMLPConfig], ids=VARIANTS)
def test_adapters_do_not_keep_it(config, tmp_path):
    import moshi_ttt

    model = moshi_ttt.load_model("builtin:tiny")
    save_adapter(moshi_ttt.inject(model, config(layers="last:1", backend="cpp")), tmp_path / "adapter")
    manifest = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert "backend" not in manifest["sites"][0]["config"]
    loaded = load_adapter(moshi_ttt.load_model("builtin:tiny"), tmp_path / "adapter")
    assert [block.config.backend for block in loaded.blocks.values()] == ["auto"]
