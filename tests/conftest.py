"""Settings that must hold before anything imports torch or moshi, and what tests of every package share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

# Moshi compiles `LMModel.out_norm` at its first forward unless this is set before it is imported: 20 s on a CPU.
os.environ["NO_TORCH_COMPILE"] = "1"
# The processes that tests spawn (gloo ranks, the command line) inherit these. See below for why one thread. Whoever
# takes more waits without spinning, and torch.compile compiles in the process itself, not in one helper a core.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# No test may reach the network: what a user would download is in the package or in a temporary folder.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

# One thread: the tensors of the tests are too small to share, and the order of a sum, so its last bit, then does not
# depend on how many cores a machine has. Two tests at a time (`pytest -n 2`) use two cores better than this would.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark ``first_by_default``, every combination but the first is ``exhaustive``."""
    seen = set()
    for item in items:
        if item.get_closest_marker("first_by_default") is None:
            continue
        function = item.nodeid.split("[")[0]
        if function in seen:
            item.add_marker(pytest.mark.exhaustive)
        seen.add(function)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what importing and collecting made to itself: the collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs a command line in an empty folder; whitespace in what it prints is single blanks."""
    from moshi_ttt.apps.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        result.said = " ".join((result.stdout + result.stderr).split())
        return result

    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, an empty folder ``home`` in ``tmp_path``."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return folder
