"""The Triton kernels of a streamed step, in Triton's interpreter: outputs and state are those of tensor operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from moshi_ttt.core.errors import BackendError, ContextError
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.hybrid.backends import STEP, HybridUse
from moshi_ttt.plugins.hybrid.triton import step, trial
from tests.project import ROOT

CASES = (
    "linear",
    "mlp",
    "mlp, odd sizes",
    "mlp, embeddings, one gate, bfloat16",
    "linear, convolution",
    "three layers",
)
KERNELS = {"linear": 6, "mlp": 6, "three layers": 9}
"""Of a step."""
SLOW = ("linear, chunk 16", "mlp, chunk 16", "mlp, chunk 40", "four layers, odd sizes")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


def run_worker(*cases: str) -> dict[str, dict[str, float]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.plugins.triton_step_worker", *cases]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return run_worker(*CASES)


@pytest.fixture(scope="module")
def counted():
    return run_worker("given tokens, mlp", *(f"launches of {case}" for case in KERNELS))


def check(errors: dict[str, float], skipped: float, limit: float = 1e-5) -> None:
    exact = ("masked rows that changed", "buffers that moved", "what a stranger changed")
    assert {name: errors.pop(name, 0.0) for name in exact} == dict.fromkeys(exact, 0.0)
    assert errors.pop("updates that were skipped") == skipped
    assert len(errors) >= 8
    assert max(errors.values()) <= limit, errors


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.exhaustive  # minutes of an interpreter; test_triton_linear.py runs the kernels of one layer by default
def test_every_step_is_that_of_tensor_operations(found, case):
    """Rows out of step, masks, updates that are disabled, volumes, tokens that are not finite, a reset, poison."""
    limit = 2e-2 if "bfloat16" in case else 1e-5  # a projection may round to another number of the host's dtype
    check(found[case], 1.0 if case == "mlp, odd sizes" else 2.0, limit)


@needs_triton
@pytest.mark.exhaustive  # a longer chunk and a fourth layer run the kernels of the cases above
@pytest.mark.parametrize("case", SLOW)
def test_longer_chunks_and_more_layers(case):
    check(run_worker(case)[case], 1.0 if case in ("linear, chunk 16", "mlp, chunk 40") else 2.0)


@needs_triton
@pytest.mark.exhaustive  # a process with an interpreter, for seconds
@pytest.mark.parametrize(("case", "kernels"), KERNELS.items())
def test_launches_of_a_step(counted, case, kernels):
    """With frozen parameters: the kernels, and the four projections by torch."""
    assert counted[f"launches of {case}"] == {"kernels": kernels, "of torch": 4}


@needs_triton
@pytest.mark.exhaustive  # the same
def test_the_inner_loop_alone(counted):
    assert counted["given tokens, mlp"]["error"] <= 1e-5


def use_of(options=None, device="cuda", dtype=torch.float32, widths=(128, 512, 128)):
    config = default_cases("ttt_mlp", [{"chunk": 32, **(options or {})}])[0].config
    return HybridUse(config, widths, torch.device(device), dtype)


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU of compute capability 9.0."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trial, "not_agreed", lambda use, operation: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@needs_triton
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "cpu"}, "its device is cpu"),
        ({"dtype": torch.float64}, r"its state is torch\.float64; the kernels of a step are for float32 and bfloat16"),
        ({"options": {"momentum": 0.9}}, r"it has momentum: 0\.9"),
        ({"options": {"inner_steps": 2}}, "it has inner_steps: 2"),
        ({"options": {"inner_norm": False}}, "it has inner_norm: False"),
        ({"options": {"chunk": 2048}}, "chunk: 2048; the kernels take chunks up to 1024"),
        ({"widths": (512, 512)}, "widths 512, 512; the kernels take heads up to 256"),
        ({"widths": (128, 8192, 128)}, "hidden layers up to 4096"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_compute_is_refused_with_the_reason(given, said, card):
    with pytest.raises(BackendError, match=f"backend: triton was asked for a streamed step.*{said}"):
        STEP.choose("triton", use_of(**given), "layers.0")


@needs_triton
@pytest.mark.parametrize("widths", [(128, 128), (128, 512, 128), (64, 256, 256, 64)])
def test_auto_takes_what_is_recorded_to_fit(widths, card):
    assert STEP.choose("auto", use_of(widths=widths), "layers.0").name == "triton"


@needs_triton
@pytest.mark.parametrize(
    "given",
    [
        {"widths": (96, 96)},
        {"widths": (128, 256, 128)},
        {"options": {"chunk": 64}},
        {"widths": (64, *(256,) * 3, 64)},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_auto_passes_by_what_is_not_recorded(given, card):
    assert STEP.choose("auto", use_of(**given), "layers.0").name == "torch"
    assert STEP.choose("triton", use_of(**given), "layers.0").name == "triton"


@needs_triton
def test_auto_leaves_the_interpreter_to_tests(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert STEP.choose("auto", use_of(device="cpu"), "layers.0").name != "triton"


@needs_triton
def test_kernels_that_were_imported_to_be_compiled_are_not_run_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="Triton was imported before TRITON_INTERPRET=1 was set"):
        STEP.choose("triton", use_of(device="cpu"), "layers.0")


def test_a_state_of_another_shape_is_refused():
    case = default_cases("ttt_mlp", [{"chunk": 4}])[1]
    state = case.block().allocate_state(2)
    q = torch.zeros(2, 1, case.shape.heads, case.shape.dim // case.shape.heads)
    step.check_parts(state, q, 4)
    state["gradient.0"] = state["gradient.0"][:, :, :3].contiguous()
    with pytest.raises(ContextError, match=r"'gradient\.0' has shape .*Take the state from the block's allocate_state"):
        step.check_parts(state, q, 4)
