"""The Triton kernels of TTT-MLP training, in Triton's interpreter: results and gradients are the chunk form's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from tests.project import ROOT

CASES = ("causal", "not causal", "less than a chunk", "an update that is skipped")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


@pytest.fixture(scope="module")
def errors():
    """Of each case, by result: ||a - b|| / ||b||, b in float64."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.plugins.triton_mlp_worker"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.exhaustive  # minutes of an interpreter; test_triton_linear.py runs the kernels of one layer by default
def test_results_and_every_gradient_are_those_of_the_chunk_form(errors, case):
    assert set(errors) == set(CASES)
    assert len(errors[case]) == 16
    assert max(errors[case].values()) <= 1e-5, errors[case]


@needs_triton
def test_slices_that_do_not_fill_the_hidden_width_raise():
    from moshi_ttt.plugins.hybrid.triton.mlp_chunk import mlp_chunks
    from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings

    token, settings = torch.zeros(1, 16, 1, 16), TrainSettings(chunk=16, eps=1e-6, slice_width=48)
    weights = torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 64, 16)
    biases = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 16)
    norm, lr = torch.zeros(1, 16), torch.zeros(1, 16, 1)
    with pytest.raises(ValueError, match="no whole number of slices of 48"):
        mlp_chunks(
            token, token, token, lr, weights, biases, norm, norm, torch.ones(16), torch.ones(1, 1), settings
        )  # fmt: skip
