"""What tests of several commands need."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from tests.project import ROOT

GOLDENS = ROOT / "tests" / "goldens"


def write_wav(path: Path, samples: np.ndarray, rate: int = 8_000) -> Path:
    """16-bit mono."""
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(1)
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes((samples * 32767).astype("<i2").tobytes())
    return path
