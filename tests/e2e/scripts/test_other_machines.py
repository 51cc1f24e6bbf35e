"""The switches that make this machine compute as others do: each that is run changes a result, or is said not to."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.project import ROOT

SCRIPT = ROOT / "scripts" / "other_machines.py"


@pytest.mark.exhaustive  # `make test-machines`, which CI runs too, tries the same
def test_the_switches_are_listed_with_what_they_change():
    result = subprocess.run([sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    named = [line for line in lines if ": changes " in line]
    assert len(named) == 7, result.stdout + result.stderr
    changing = [line for line in named[:4] if "changes nothing" not in line]
    assert result.returncode == 0
    assert changing or "nothing was tried here" in result.stdout
    for line in changing:
        assert any(dtype in line for dtype in ("float64", "float32", "bfloat16")), line
