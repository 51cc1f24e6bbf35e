"""The folder in which the commands of a page run: the files that the documents call by name, small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from moshi_ttt.data.audio import write_wav
from moshi_ttt.hosts.moshi import bundle

RATE = 24_000
SPEECH = Path(bundle.__file__).parent / "speech"
WORDS = ("and", "then", "we", "go")
SPLITS = ("train", "train", "valid", "valid", "test", "test")
SECONDS = 16.0
"""Of each recording: three times what the tiny Moshi's attention sees."""
SHORT = 2.0
"""Seconds of what is played to Moshi."""
RUN = Path("runs/train-cpu")
"""The run whose checkpoint the guides evaluate and serve."""


def make_world(folder: Path) -> None:
    """``speech/`` as ``scripts/fetch_speech.py`` writes it, recordings, and a checkpoint of ``train-cpu``."""
    read = [sphn.read(path, sample_rate=RATE)[0][:1] for path in sorted(SPEECH.glob("*.wav"))]  # each [1, samples]
    sound = np.concatenate(read, axis=1)
    for part, split in enumerate(SPLITS):
        start = int(part * SECONDS * RATE)
        cut = torch.from_numpy(sound[:1, start : start + int(SECONDS * RATE)])  # [1, samples]
        path = folder / "speech" / "stereo" / f"{split}-{part}.wav"
        save_recording(path, torch.cat([cut, torch.zeros_like(cut)]))
        line = {"path": f"stereo/{path.name}", "duration": cut.shape[1] / RATE}
        with (folder / "speech" / f"{split}.jsonl").open("a", encoding="utf-8") as manifest:
            manifest.write(json.dumps(line) + "\n")
    for name in ("calls/one.wav", "calls/two.wav", "calls/three.wav"):
        (folder / "calls").mkdir(exist_ok=True)
        shutil.copy(folder / "speech" / "stereo" / "test-4.wav", folder / name)
    for name in ("monday.wav", "tuesday.wav", "talk.wav", "talks/one.wav", "talks/two.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_wav(folder / name, torch.from_numpy(sound[0, : int(SHORT * RATE)]), RATE)


def save_recording(path: Path, samples: torch.Tensor) -> None:
    """A wav of ``samples [channels, n]``, and its transcript beside it: a word a second, all Moshi's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, samples, RATE)
    seconds = int(samples.shape[1] / RATE)
    words = [[WORDS[at % len(WORDS)], [at + 0.1, at + 0.6], "SPEAKER_MAIN"] for at in range(seconds)]
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}), encoding="utf-8")


def train_checkpoint(folder: Path) -> None:
    """A run of two steps where the documents have one of 150."""
    from tests.docs.running import inside, run_command

    with inside(folder):
        run_command(["moshi-ttt", "train", "train-cpu"])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, made once for all pages; each page gets a copy."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    train_checkpoint(folder)
    return folder
