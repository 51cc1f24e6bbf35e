"""The tiny Moshi's codec, and recordings with transcripts laid out as moshi-finetune wants them."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.hosts.moshi.loading import load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.tiny import speech_files

RATE = 24_000
FRAME = 1920
WORDS = ("hello", "there", "how", "are", "you", "welcome", "to", "the", "conference")


@pytest.fixture(scope="session")
def codec() -> SpeechCodec:
    bundle = resolve_repo("builtin:tiny")
    return SpeechCodec.of(load_skeleton("builtin:tiny"), bundle.load_mimi(), bundle.tokenizer())


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """Real speech, ``[samples]`` at 24 kHz."""
    return torch.cat([read_audio(path, RATE) for path in speech_files()[:3]]).numpy()


@pytest.fixture
def recordings(tmp_path, speech) -> Path:
    """A manifest of three recordings, stereo, mono and stereo, of 61, 20 and 33 frames, the last frame not full."""
    entries = []
    for number, (frames, channels) in enumerate([(61, 2), (20, 1), (33, 2)]):
        count = frames * FRAME - 700
        samples = np.stack([speech[(number + c) * 50_000 :][:count] for c in range(channels)])
        write_audio(tmp_path / f"talk{number}.wav", samples)
        write_transcript(tmp_path / f"talk{number}.json", words_every(0.4 + 0.1 * number, count / RATE))
        entries.append({"path": f"talk{number}.wav", "duration": count / RATE})
    return write_manifest(tmp_path / "train.jsonl", entries)


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """16-bit wav of ``samples [channels, count]``."""
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(samples.shape[0])
        handle.setsampwidth(2)
        handle.setframerate(rate)
        handle.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def write_transcript(path: Path, words: Sequence[tuple[str, float, float]], speaker: str = "SPEAKER_MAIN") -> Path:
    path.write_text(json.dumps({"alignments": [[word, [start, end], speaker] for word, start, end in words]}))
    return path


def write_manifest(path: Path, entries: Sequence[object]) -> Path:
    """A line for each entry: a string as it is, anything else as JSON."""
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def words_every(seconds: float, total: float) -> list[tuple[str, float, float]]:
    return [(WORDS[n % len(WORDS)], n * seconds, (n + 0.7) * seconds) for n in range(int(total / seconds))]


def cut_off(path: Path, share: float) -> None:
    """Leave the first ``share`` of a file, whose header then promises too much."""
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * share) // 4 * 4])
