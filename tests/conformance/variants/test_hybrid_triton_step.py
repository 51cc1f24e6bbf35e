"""The conformance kit on blocks whose streamed step is computed by Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.project import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


def run(test: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    module = f"tests/conformance/variants/triton_step_kit.py::{test}"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "",
        module,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]


@pytest.mark.exhaustive  # minutes of an interpreter; test_triton_linear.py runs the kernels of one layer by default
def test_kit_thin():
    run("test_kit_thin")


@pytest.mark.slow
def test_kit():
    run("test_kit")


@pytest.mark.exhaustive  # the same inner loop, beside tensor operations, is in the worker's cases
def test_verify():
    run("test_verify")
