"""``benchmarks/run.py`` as a program, at the smallest sizes: every gate is green and every comparison runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.project import ROOT

SUITES = ("inner-loop", "in-place", "blocks", "scaling", "model")


@pytest.mark.exhaustive  # the gates compare what the conformance suites compare; what is timed is no check
def test_every_suite_runs(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--size", "smoke", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=540
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "metrics.json").read_text())
    assert all(gate["passed"] for gate in found["gates"])
    assert len(found["gates"]) > 10
    names = [each["name"] for each in found["comparisons"]]
    assert len(names) == len(set(names))
    for part in ("inner loop, training, mlp", "in-place TTT, training", "blocks, training", "model, training step"):
        assert part in names
    for axis in ("T", "B", "C", "heads"):
        assert f"scaling, training, mlp, over {axis}" in names
        assert axis == "T" or f"scaling, a chunk of steps, mlp, over {axis}" in names
    for each in found["comparisons"]:
        assert all(spread["median"] > 0 for spread in each["ratios"].values()), each["name"]
        assert each["peak_bytes"][each["reference"]] >= 0
    assert {"ratios.png", "scaling.png", "report.md"} <= {path.name for path in out.iterdir()}


@pytest.mark.exhaustive  # a process, for a list of names
def test_the_suites_are_those_that_the_documents_name():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--help"], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert all(name in done.stdout for name in SUITES)
