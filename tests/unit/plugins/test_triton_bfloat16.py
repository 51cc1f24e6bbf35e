"""Calls and steps by Triton kernels under the policy ``uniform``: no less precise than tensor operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.project import ROOT

BY_DEFAULT = ("linear, continued", "steps of linear")
OTHERS = (
    "linear", "mlp", "mlp, continued", "mlp, continued by less than a chunk", "linear, a convolution", "steps of mlp",
    "steps of three layers", "steps of linear, a convolution",
)  # fmt: skip
ROUNDED = 2.0**-8
"""Half of the last bit of a bfloat16 at 1: what rounding a result of a few numbers may change."""
CHANCE = {"lr_bias"}
"""Two numbers, each a sum that cancels: torch's error is 0.0005 or 0.02, by chance. It counts on average alone."""

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


def check(cases: tuple[str, ...]) -> None:
    """Errors against float64: of each result at most torch's and a rounding, and less than torch's on average."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.plugins.triton_bfloat16_worker", *cases]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert set(found) == set(cases)
    for case, errors in found.items():
        torch, triton = errors["torch"], errors["triton"]
        assert torch.keys() == triton.keys()
        assert len(torch) >= 8
        larger = {name: error for name, error in triton.items() if not error <= torch[name] + ROUNDED}
        assert set(larger) <= CHANCE, (case, larger, torch)
        assert 0 < sum(triton.values()) < sum(torch.values()), (case, errors)


@pytest.mark.exhaustive  # an interpreter, for ten seconds; test_triton_linear.py runs kernels by default
def test_calls_and_steps_are_no_less_precise_than_tensor_operations():
    check(BY_DEFAULT)


@pytest.mark.exhaustive  # the same for more layers, parts of chunks and what is around the inner loop
@pytest.mark.parametrize("case", OTHERS)
def test_other_calls_and_steps(case):
    check((case,))
