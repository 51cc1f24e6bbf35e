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


ONE_OF_EACH_KIND = {"ttt_mlp", "gating_mlp"}
VARIANTS = {"ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``exhaustive`` what ``first_by_default`` and ``each_kind`` leave to ``make test-full``.

    The first mark leaves every combination of a test but the first, the second those of variants that are not in
    ``ONE_OF_EACH_KIND``, and those of further options (named "VARIANT, OPTIONS").
    """
    seen = set()
    for item in items:
        if item.get_closest_marker("each_kind") is not None and _variants(item) - ONE_OF_EACH_KIND:
            item.add_marker(pytest.mark.exhaustive)
        if item.get_closest_marker("first_by_default") is None:
            continue
        function = item.nodeid.split("[")[0]
        if function in seen:
            item.add_marker(pytest.mark.exhaustive)
        seen.add(function)


def _variants(item: pytest.Item) -> set[str]:
    """The variants and their options that a test is parametrized by."""
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {value for value in given if isinstance(value, str) and value.split(",")[0] in VARIANTS}


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
