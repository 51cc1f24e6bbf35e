"""``auto`` takes kernels only where they agreed with tensor operations on that kind of GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.hybrid import backends
from moshi_ttt.plugins.hybrid.backends import STEP, TRAIN, HybridUse
from moshi_ttt.plugins.hybrid.triton import backend, trial
from moshi_ttt.plugins.hybrid.triton.trial import differences, not_agreed
from tests.project import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
AGREEING = {"output": 2e-6, "gradient": 3e-5}


def use_of(variant="ttt_mlp", **options) -> HybridUse:
    block = default_cases(variant, [{"chunk": 4, **options}])[0].block()
    widths = block.widths(block.config, block.info.dim // block.info.num_heads)
    return HybridUse(block.config, widths, torch.device("cpu"), torch.float32, layer=type(block))


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(trial, "_FOUND", {})


@pytest.fixture
def tried(monkeypatch):
    """What is tried, and what it gives: the last of ``gives`` again and again."""
    calls: list[str] = []
    gives: list[object] = [AGREEING]

    def pretended(use, operation):
        calls.append(operation)
        result = gives.pop(0) if len(gives) > 1 else gives[0]
        if operation == "step" and isinstance(result, dict):
            result = {name.replace("gradient", "state"): value / 10 for name, value in result.items()}
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(trial, "differences", pretended)
    return calls, gives


def test_what_agrees_is_tried_once_and_kept(tried, tmp_path, monkeypatch):
    calls, _ = tried
    use = use_of()
    assert [not_agreed(use, "train", folder=tmp_path) for _ in range(2)] == [None, None]
    assert calls == ["train"]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["differences"] == AGREEING
    monkeypatch.setattr(trial, "_FOUND", {})  # as another process
    assert not_agreed(use, "train", folder=tmp_path) is None
    assert calls == ["train"]


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "another GPU"}, {"triton": "9.9"}, {"torch": "9.9"}, {"sources": "changed"}, {"operation": "step"},
        {"options": "{}"}, {"head_width": 64}, {"matmul_precision": "high"}, {"layer": "another"}, {"model": "another"},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_tried_by_itself(tried, tmp_path, monkeypatch, change):
    calls, _ = tried
    real, use = trial._tried, use_of()
    assert not_agreed(use, "train", folder=tmp_path) is None
    monkeypatch.setattr(trial, "_tried", lambda *given: replace(real(*given), **change))
    assert not_agreed(use, "train", folder=tmp_path) is None
    assert calls == ["train", "train"]


@pytest.mark.parametrize("gradient", [2e-4, math.nan, math.inf])
def test_what_differs_is_not_taken_and_not_kept(tried, tmp_path, gradient, caplog):
    calls, gives = tried
    gives.insert(0, {"output": 1e-6, "gradient": gradient})
    reason = not_agreed(use_of(), "train", folder=tmp_path)
    assert f"differ from tensor operations on cpu: gradient by {gradient:.1e} (allowed 1e-04)" in reason
    assert "output" not in reason
    assert not list(tmp_path.iterdir())
    assert not_agreed(use_of(), "train", folder=tmp_path) == reason, "it is tried once in a process"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Please report it" in caplog.text
    trial._FOUND.clear()
    assert not_agreed(use_of(), "train", folder=tmp_path) is None, "the next process tries again"
    assert len(calls) == 2


def test_what_fails_is_a_reason(tried, tmp_path):
    tried[1].insert(0, RuntimeError("out of resources"))
    reason = not_agreed(use_of(), "step", folder=tmp_path)
    assert "failed when they were tried on cpu: RuntimeError: out of resources" in reason
    assert not list(tmp_path.iterdir())


def test_without_memory_the_next_block_tries_again(tried, tmp_path):
    tried[1].insert(0, torch.OutOfMemoryError())
    assert "no memory on cpu" in not_agreed(use_of(), "train", folder=tmp_path)
    assert not_agreed(use_of(), "train", folder=tmp_path) is None


def test_a_mistake_of_the_trial_itself_is_raised(tried, tmp_path):
    tried[1].insert(0, TypeError("a mistake"))
    with pytest.raises(TypeError, match="a mistake"):
        not_agreed(use_of(), "train", folder=tmp_path)


def test_products_in_tf32_may_differ_by_more(tried, tmp_path):
    tried[1][:] = [{"output": 5e-3, "gradient": 5e-3}]
    assert not_agreed(replace(use_of(), matmul_precision="high"), "train", folder=tmp_path) is None
    assert "output by 5.0e-03" in not_agreed(use_of(), "train", folder=tmp_path)


def test_a_bfloat16_model_is_compared_in_its_dtype_too(tried, tmp_path):
    use = replace(use_of(), model=torch.bfloat16)
    tried[1][:] = [{**AGREEING, "output, bfloat16": -0.1, "gradient, bfloat16": 0.1}]
    assert "differ from tensor operations on cpu: gradient, bfloat16 by" in not_agreed(use, "train", folder=tmp_path)


def test_nothing_is_tried_while_a_graph_is_captured(tried, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    on_gpu = replace(use_of(), device=torch.device("cuda", 0))
    assert "a graph is being captured" in not_agreed(on_gpu, "step", folder=tmp_path)
    assert tried[0] == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tried": 3}'])
def test_a_file_that_does_not_serve_is_written_anew(tried, tmp_path, text):
    use = use_of()
    assert not_agreed(use, "train", folder=tmp_path) is None
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    trial._FOUND.clear()
    assert not_agreed(use, "train", folder=tmp_path) is None
    assert json.loads(file.read_text())["differences"] == AGREEING
    assert len(tried[0]) == 2


def test_a_folder_that_cannot_be_written_changes_nothing(tried, tmp_path):
    (tmp_path / "file").write_text("")
    assert not_agreed(use_of(), "train", folder=tmp_path / "file" / "folder") is None


# ---- what is compared, without kernels: tensor operations in float32 stand for them


@pytest.fixture
def no_kernels(monkeypatch):
    real = trial._block
    monkeypatch.setattr(trial, "_block", lambda use, operation, name, dtype: real(use, operation, "torch", dtype))
    return real


@pytest.mark.parametrize("operation", ["train", "step"])
@pytest.mark.parametrize(
    ("variant", "options"),
    [("ttt_linear", {}), ("ttt_mlp", {"bidirectional": False, "value": "embedding"}), ("ttt_multilayer", {"depth": 3})],
    ids=str,
)
def test_tensor_operations_agree_with_themselves(no_kernels, variant, options, operation):
    use = use_of(variant, **options)
    found = differences(use, operation)
    assert set(found) == {"output", "gradient" if operation == "train" else "state"}
    assert all(0 < value < trial.limits_of(use, operation)[name] for name, value in found.items())


@pytest.mark.parametrize("operation", ["train", "step"])
def test_in_a_bfloat16_model_too(no_kernels, operation):
    use = replace(use_of(), model=torch.bfloat16)
    found = differences(use, operation)
    assert set(found) == set(trial.limits_of(use, operation))
    assert [value for name, value in found.items() if "bfloat16" in name] == [0, 0], "the same form, twice"


@pytest.mark.parametrize("head_width", [16, 64, 128])
@pytest.mark.parametrize(
    ("variant", "options"), [("ttt_linear", {"chunk": 32}), ("ttt_multilayer", {"depth": 3})], ids=str
)
def test_every_chunk_updates_the_memory_and_every_gate_is_open(variant, options, head_width):
    use = use_of(variant, **options, gate={"alpha": "fixed", "init": 0.0})
    use = replace(use, widths=tuple(head_width * width // use.widths[0] for width in use.widths))
    block = trial._block(use, "train", "torch", torch.float32)
    assert bool((block.token_scale() > 0.01).all())
    assert float(torch.as_tensor(block.gate).abs().min()) > 0


@pytest.mark.parametrize("operation", ["train", "step"])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_what_is_not_finite_does_not_agree(monkeypatch, operation, spoiled):
    real = trial._block

    def mutated(use, operation, name, dtype):
        block = real(use, operation, "torch", dtype)
        if name == "triton":
            block.register_forward_hook(lambda module, given, out: (out[0] * spoiled, out[1]))
            step = block.step
            block.step = lambda *given: step(*given) * spoiled
        return block

    monkeypatch.setattr(trial, "_block", mutated)
    assert differences(use_of(), operation)["output"] == math.inf


def test_counters_and_what_is_zero_are_compared():
    counters = torch.tensor([1, 2])
    assert trial._difference(counters, counters.clone()) == 0
    assert trial._difference(counters, counters + 1) == math.inf
    nothing = torch.zeros(3, dtype=torch.float64)
    assert trial._difference(torch.full((3,), 1e-8), nothing) == 0
    assert trial._difference(torch.full((3,), 1e-2), nothing) == math.inf


MODES = {
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "counted": lambda: FlopCounterMode(display=False),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_mode_of_the_call_that_asks_reaches_a_trial(no_kernels, mode):
    alone = differences(use := use_of(), "train")
    with mode() as entered:
        assert differences(use, "train") == alone
    if isinstance(entered, FlopCounterMode):
        assert entered.get_total_flops() == 0


def test_a_block_that_is_not_causal_is_tried_by_its_calls(no_kernels):
    assert differences(use_of(causal=False), "train")["output"] < 1e-5


@pytest.mark.parametrize(("operation", "other"), [("train", "gradient"), ("step", "state")])
def test_a_difference_is_found(monkeypatch, operation, other):
    """A parameter of one of both blocks is another by a thousandth."""
    real = trial._block

    def mutated(use, operation, name, dtype):
        block = real(use, operation, "torch", dtype)
        if name == "torch":  # its parameters are those of the other one, so its rate is set by an option
            block.config = block.config.model_copy(update={"base_lr": 1.001 * block.config.base_lr})
        return block

    monkeypatch.setattr(trial, "_block", mutated)
    found = differences(use_of(), operation)
    assert max(found["output"], found[other]) > 1e-4


def test_a_trial_is_apart_from_the_call_that_asks(no_kernels):
    def asking(x):
        found.append(differences(use_of(), "train"))
        return x * x  # which needs x in the backward pass, so the call is repeated there

    found: list[dict[str, float]] = []
    torch.manual_seed(3)
    before = torch.get_rng_state()
    x = torch.ones(2, requires_grad=True)
    checkpoint(asking, x, use_reentrant=False).sum().backward()
    with torch.no_grad():
        asking(x)
    with torch.inference_mode():
        asking(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        asking(x)
    assert x.grad.tolist() == [2, 2]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(each == found[0] for each in found)
    assert len(found) == 5


# ---- what auto does with it


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU of compute capability 9.0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize("operation", [TRAIN, STEP], ids=lambda operation: operation.name)
def test_auto_takes_kernels_that_agree_and_no_others(card, tried, tmp_path, monkeypatch, operation):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in (backends.train, backends.step):
        monkeypatch.setattr(each, "load", lambda *given: "kernels")
    use = replace(use_of("ttt_linear", chunk=16), device=torch.device("cuda"), widths=(128, 128))
    tried[1].insert(0, {"output": 100.0})
    assert operation.choose("auto", use, "layers.0").name == "torch"
    assert operation.choose("triton", use, "layers.0").name == "triton", "by name it is the user's choice"
    trial._FOUND.clear()
    assert operation.choose("auto", use, "layers.0").name == "triton"
    assert tried[0] == [operation.name] * 2
    assert len(list((tmp_path / "moshi-ttt" / "triton-trials").iterdir())) == 1


def test_auto_takes_none_without_a_block_to_try(card):
    use = replace(use_of("ttt_linear", chunk=16), device=torch.device("cuda"), widths=(128, 128), layer=None)
    assert TRAIN.choose("auto", use, "layers.0").name == "torch"


# ---- with the kernels


def in_the_interpreter(*arguments):
    command = [sys.executable, "-m", "tests.unit.plugins.triton_trial_worker", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.exhaustive  # an interpreter, for seconds
@pytest.mark.parametrize(
    ("variant", "operation"),
    [("ttt_linear", "train"), ("ttt_mlp", "train"), ("ttt_linear", "step"), ("ttt_mlp", "step"),
     ("ttt_multilayer", "step")],
)  # fmt: skip
def test_the_kernels_agree(variant, operation):
    found = in_the_interpreter(variant, operation)
    assert found.pop("same generator")
    assert found["output"] < trial.OUTPUT_LIMIT
    assert found.get("gradient", 0) < trial.GRADIENT_LIMIT
    assert found.get("state", 0) < trial.OUTPUT_LIMIT


@pytest.mark.exhaustive  # the same
def test_kernels_with_a_mistake_do_not(monkeypatch):
    assert in_the_interpreter("ttt_linear", "train", "wrong")["gradient"] > trial.GRADIENT_LIMIT
