"""What Moshi compiles, in processes of their own: it decides when it is imported, and here it is imported without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "compile_worker.py"


def run(case: str, **environment: str) -> str:
    """Run a case of the worker in a process where Moshi compiles, as it does with a CUDA device present."""
    # An empty value is one that the user has set: Moshi reads it as no.
    environment = {**os.environ, "NO_TORCH_COMPILE": "", "NO_CUDA_GRAPH": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, str(WORKER), case], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.exhaustive  # a process for ten seconds; NO_TORCH_COMPILE is set for all others
def test_nothing_is_compiled_where_the_device_is_a_cpu():
    """Before: the first forward pass compiled the norm after the last layer, and failed without g++."""
    assert "done" in run("computes_without_compiling", PATH="", CXX="")


@pytest.mark.exhaustive  # a process that rounds as compiled code does; CI runs it with the compiler, below, too
def test_step_0_is_the_base_as_it_computes_where_moshi_compiles():
    """Before: 0.02 apart in bfloat16 logits. A function that rounds as compiled code does stands for the compiler."""
    assert "done" in run("starts_at_the_base_without_a_compiler")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.exhaustive
def test_step_0_is_the_base_as_it_computes_with_the_compiler():
    assert "done" in run("starts_at_the_base")
