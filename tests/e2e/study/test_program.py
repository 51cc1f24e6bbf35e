"""The study as a program: ``python examples/study`` from any folder, without a part of it in the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moshi_ttt.apps import console
from tests.project import ROOT, run_environment


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "study"), *arguments]
    environment = run_environment() | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_its_help_lists_its_options(tmp_path):
    done = program(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    for option in (
        "--jobs",
        "--known",
        "--out",
        "--results",
        "--seed",
        "--shipped",
        "--smoke",
        "--stage",
        "--threads",
        "--unseen",
        "--unseen-valid",
    ):
        assert option in done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_a_number_of_threads_that_is_none_is_refused(tmp_path, value):
    done = program(tmp_path, "--out", "x", "--known", "y", "--threads", value)
    assert done.returncode == console.EXIT_ERROR
    assert "--threads" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive  # a process; messages are those of the package
def test_recordings_that_are_not_there_are_a_message(tmp_path):
    done = program(tmp_path, "--out", "study", "--known", "nowhere", "--smoke")
    assert done.returncode == console.EXIT_ERROR
    assert done.stderr.startswith("Error: There is no nowhere/train.jsonl")
    assert "Traceback" not in done.stderr
