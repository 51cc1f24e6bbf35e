"""``backend: triton`` in Triton's interpreter: the kit, and calls beside those of tensor operations.

Triton decides when it is imported whether it interprets, so ``triton_kit.py`` runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.project import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton here")


def passed(*chosen: str) -> int:
    """Tests of ``triton_kit.py`` that passed; fails where one did not."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore",
        "tests/conformance/variants/triton_kit.py", *chosen,
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) passed", result.stdout)
    assert found is not None, result.stdout[-2000:]
    return int(found[1])


@pytest.mark.exhaustive  # minutes of an interpreter; test_triton_linear.py runs the kernels of one layer by default
def test_thin_part_of_the_kit_and_calls_beside_those_of_tensor_operations():
    assert passed("-k", "ttt_linear and (test_kit_thin or test_a_call or test_verify)") >= 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("chosen", ["ttt_linear and test_kit", "ttt_mlp and (test_kit or test_a_call)", "test_verify"])
def test_whole_kit_and_verify(chosen):
    assert passed("-k", chosen) >= 1
