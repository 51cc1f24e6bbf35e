"""The Triton kernels of TTT-Linear training, in Triton's interpreter: results and gradients are the chunk form's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.project import ROOT

CASES = ("causal", "not causal", "less than a chunk", "an update that is skipped")


@pytest.fixture(scope="module")
def errors():
    """Of each case, by result: ||a - b|| / ||b||, b in float64."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.plugins.triton_linear_worker"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")
@pytest.mark.parametrize("case", CASES)
def test_results_and_every_gradient_are_those_of_the_chunk_form(errors, case):
    assert set(errors) == set(CASES)
    assert len(errors[case]) == 12
    assert max(errors[case].values()) <= 1e-5, errors[case]
