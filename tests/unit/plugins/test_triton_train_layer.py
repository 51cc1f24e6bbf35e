"""Training calls of whole blocks by Triton kernels, in Triton's interpreter: the definition's results and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.project import ROOT

CASES = (
    "linear", "linear, not causal", "linear, volumes by row", "mlp", "mlp, less than a chunk",
    "mlp, a row without updates", "mlp, both directions", "mlp, tokens that may not enter", "linear, continued",
    "mlp, continued", "mlp, continued, one row anew", "mlp, continued, tokens that may not enter",
    "mlp, the state wanted", "linear, gradients of the state", "mlp, gradients of the state",
)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """Of each case, by result: ||a - b|| / ||b||, b in float64; and how many kernels each variant launches."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.plugins.triton_train_layer_worker"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here"),
    pytest.mark.exhaustive,  # minutes of an interpreter
]


@pytest.mark.parametrize("case", CASES)
def test_results_and_every_gradient_are_those_of_the_definition(found, case):
    errors = found["errors"]
    assert set(errors) == set(CASES)
    assert {"y", "x", "wq.weight", "lr_weight", "norm_weight", "post_norm.weight", "gate"} <= set(errors[case])
    assert max(errors[case].values()) <= 1e-5, errors[case]


def test_figures_of_health_are_those_of_tensor_operations_with_fewer_launches(found):
    for figures in found["health"].values():
        by_torch, by_kernels = figures.pop("launches")
        assert by_kernels < 0.7 * by_torch
        assert figures["inner_loss_before"][0] != figures["inner_loss_after"][0]
        assert figures["nonfinite_tokens"][0] > 0
        assert {name: pair[1] for name, pair in figures.items()} == pytest.approx(
            {name: pair[0] for name, pair in figures.items()}, rel=1e-5
        )


def test_as_many_kernels_are_counted_without_values_as_run(found):
    for computed, counted in found["launches"].values():
        assert computed == counted > 10
