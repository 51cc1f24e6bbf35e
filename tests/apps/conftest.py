"""The command line as a user runs it, in this process."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from moshi_ttt.apps.cli import app

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture
def cli(monkeypatch, tmp_path) -> Callable[..., Result]:
    """Runs a command line in an empty folder; whitespace in what it prints is single blanks."""
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


def write_wav(path: Path, samples: np.ndarray, rate: int = 8_000) -> Path:
    """16-bit mono."""
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes((samples * 32767).astype("<i2").tobytes())
    return path
