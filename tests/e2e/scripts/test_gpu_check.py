"""scripts/gpu_check.py on a CPU: green where all is well, red where something is wrong or was left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from tests.project import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture
def checks(monkeypatch):
    """The modules of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_checks import blocks, report, source_tree

    return {"blocks": blocks, "report": report, "source_tree": source_tree}


@pytest.fixture
def report(checks, tmp_path):
    return checks["report"].Report(tmp_path, torch.device("cpu"), small=True, budget=1000.0)


def run(folder, *options):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.exhaustive
def test_every_section_passes_on_a_cpu(tmp_path):
    result = run(tmp_path, "--budget", "3000")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["passed"]
    assert set(found["sections"]) == {
        "blocks", "captured step", "generation", "slots", "step 0", "training", "ceilings", "speed of blocks",
        "training kernels", "decode kernels", "speed of decoding", "speed of slots", "speed of training",
    }  # fmt: skip
    assert {section["state"] for section in found["sections"].values()} == {"passed"}
    checked = {check["section"] for check in found["checks"]}
    assert {
        "blocks",
        "captured step",
        "generation",
        "slots",
        "step 0",
        "training",
        "training kernels",
        "decode kernels",
    } <= checked
    assert any(name.startswith("decode 5 in place") for name in found["figures"])
    assert "| blocks | passed |" in (tmp_path / "gpu_check.md").read_text()


def test_the_table_of_a_step_in_the_guide_is_what_the_script_reckons(checks):
    from gpu_checks.steps import table

    assert table() in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.exhaustive  # a process; what has not run is no pass either, below, in this one
def test_what_is_skipped_is_not_a_pass(tmp_path):
    result = run(tmp_path, "--budget", "0", "--only", "blocks", "--only", "step 0")
    assert result.returncode == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: section["state"] for name, section in found["sections"].items()} == {
        "blocks": "skipped", "step 0": "skipped",
    }  # fmt: skip
    assert "NOT passed" in result.stdout


@pytest.mark.exhaustive  # that what is skipped is no pass is tested below, in less
def test_one_section_brings_what_it_needs_and_is_no_pass_of_all(tmp_path):
    result = run(tmp_path, "--only", "speed of blocks", "--budget", "3000")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(found["sections"]) == ["blocks", "ceilings", "speed of blocks"]
    assert not found["passed"]
    assert "passed, of these sections alone: blocks, ceilings, speed of blocks" in result.stdout


def test_what_has_not_run_yet_is_no_pass(checks, tmp_path):
    report = checks["report"].Report(tmp_path, torch.device("cpu"), True, 100.0, expected=("one", "two"))
    report.run("one", 1.0, lambda report: None)
    assert not json.loads((tmp_path / "gpu_check.json").read_text())["passed"]
    report.run("two", 1.0, lambda report: None)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["passed"]


def test_a_budget_that_ends_inside_a_section_is_red(checks, report):
    report.budget = 0.0
    checks["blocks"].against_float64(report)
    assert [(check["name"], check["passed"]) for check in report.checks] == [
        ("ttt_linear and what follows left out", False)
    ]


def test_the_entry_points_of_a_tree_that_is_not_installed_come_from_pyproject(checks, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    installed = {point.name: point.value for point in metadata.entry_points(group="moshi_ttt")}
    version = metadata.version("moshi-ttt")
    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(sys, "path", list(sys.path))
    checks["source_tree"].make_importable()
    (made,) = metadata.distributions(path=[sys.path[-1]])
    found = {point.name: point.value for point in made.entry_points if point.group == "moshi_ttt"}
    assert {"builtin", "moshi", "ttt_linear", "gating_mlp"} <= found.keys()
    assert found.items() <= installed.items()
    assert (made.metadata["Name"], made.version) == ("moshi-ttt", version)


@pytest.mark.exhaustive  # a test of a check
def test_a_wrong_block_is_red_and_its_times_are_not_taken(checks, report, monkeypatch):
    compute = TTTLinear.compute

    def wrong(self, x, state, context):
        y, after = compute(self, x, state, context)
        return (y + 1e-2 if x.dtype == torch.float32 else y), after

    monkeypatch.setattr(TTTLinear, "compute", wrong)
    report.run("blocks", 1.0, checks["blocks"].against_float64)
    assert report.sections["blocks"]["state"] == "failed"
    assert {check["name"].split()[0] for check in report.failed("blocks")} == {"ttt_linear"}
    timed = []
    report.run("speed", 1.0, timed.append, needs=("blocks",))
    assert report.sections["speed"]["state"] == "skipped"
    assert not timed
    assert not report.passed


@pytest.mark.exhaustive  # a test of a check
def test_a_step_that_does_not_move_its_state_is_red(checks, report, monkeypatch):
    monkeypatch.setattr(TTTLinear, "step", lambda self, x, state, context=None: x)
    report.run("captured step", 1.0, checks["blocks"].captured_step)
    assert any("never moved" in check["name"] for check in report.failed("captured step"))


def test_an_error_is_reported_and_the_others_go_on(report):
    def fails(report):
        """Fails."""
        raise RuntimeError("out of everything")

    def works(report):
        """Works."""
        report.check("one", 0.0, 1.0)

    report.run("first", 1.0, fails)
    report.run("second", 1.0, works)
    assert report.sections["first"] == {"state": "error", "what": "RuntimeError: out of everything"}
    assert report.sections["second"]["state"] == "passed"
    assert not report.passed


def test_nan_is_never_a_pass(report):
    assert not report.check("a number", float("nan"), 1.0)
    report.write()
    assert json.loads((report.folder / "gpu_check.json").read_text())["checks"][0]["value"] is None


@pytest.mark.exhaustive  # a process, for one sentence
def test_without_a_gpu_it_says_so(tmp_path):
    # CUDA_VISIBLE_DEVICES hides the devices of a machine that has some.
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()
