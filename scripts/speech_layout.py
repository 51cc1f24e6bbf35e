"""Documents of utterances: which split each goes to, how it sounds, and when each word is said."""

from __future__ import annotations

import hashlib
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from speech_packages import GAP, FetchError, Scenes, Utterance

from moshi_ttt.data.audio import read_audio

SAMPLE_RATE = 24_000
SHORTEST = 20.0
"""Seconds; a shorter document is joined to the next of its split."""
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Document:
    name: str
    split: str
    utterances: tuple[Utterance, ...]

    @property
    def seconds(self) -> float:
        return sum(u.seconds for u in self.utterances) + GAP * (len(self.utterances) - 1)

    def join(self, other: Document) -> Document:
        return Document(f"{self.name}_{other.name}", self.split, self.utterances + other.utterances)


# ------------------------------------------------------------------------------------------------- documents and splits
def fraction(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on ``name`` and ``salt`` alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "big") / 2**64


def split_of(name: str, salt: str) -> str:
    place, upper = fraction(name, salt), 0.0
    for split, share in SPLITS.items():
        upper += share
        if place < upper:
            return split
    return split


def documents_of(scenes: Scenes, salt: str) -> list[Document]:
    """One document per scene, short ones joined to the next (at the end: to the one before) of the same split."""
    made: list[Document] = []
    for split in SPLITS:
        done: list[Document] = []
        carried: Document | None = None
        for name in sorted(scenes):
            if split_of(name, salt) == split:
                document = Document(name, split, tuple(scenes[name]))
                document = carried.join(document) if carried else document
                carried = document if document.seconds < SHORTEST else None
                if carried is None:
                    done.append(document)
        if carried:
            done = [*done[:-1], done[-1].join(carried)] if done else [carried]
        made += done
    return made


def first_minutes(documents: list[Document], minutes: float, salt: str) -> list[Document]:
    """About ``minutes`` of all splits in proportion: in each, the first documents by hash until its share is full."""
    kept = []
    for split, share in SPLITS.items():
        left = 60 * minutes * share
        for document in sorted((d for d in documents if d.split == split), key=lambda d: fraction(d.name, salt)):
            if left > 0:
                kept.append(document)
                left -= document.seconds
    return kept


def main_speaker(scenes: Scenes) -> str:
    """Who speaks longest in the whole corpus."""
    spoken: dict[str, float] = {}
    for utterance in (utterance for utterances in scenes.values() for utterance in utterances):
        if utterance.speaker:
            spoken[utterance.speaker] = spoken.get(utterance.speaker, 0.0) + utterance.seconds
    if not spoken:
        raise FetchError("No recording tells who speaks: the naming of this version of the packages is not known here.")
    return max(sorted(spoken), key=spoken.__getitem__)


# -------------------------------------------------------------------------------------------------- sound and alignment
Samples = npt.NDArray[np.float32]
Alignment = tuple[str, tuple[float, float], str]


def seconds_of(samples: int) -> float:
    return round(samples / SAMPLE_RATE, 4)  # monotone: what is in order and within bounds in samples stays so


def align(text: str, start: int, samples: int) -> list[Alignment]:
    """Words of ``text`` over ``samples`` from ``start`` on, each as long as its share of the letters and digits.

    A token of punctuation alone is not spoken, and is left out.
    """
    words = [(word, sum(c.isalnum() for c in word)) for word in text.split()]
    total, passed, made = sum(letters for _, letters in words), 0, []
    for word, letters in words:
        if letters:
            begin, end = (start + round(samples * place / total) for place in (passed, passed + letters))
            made.append((word, (seconds_of(begin), seconds_of(end)), "SPEAKER_MAIN"))
            passed += letters
    return made


def lay_out(document: Document, moshi: str) -> tuple[Samples, list[Alignment]]:
    """``[2, S]`` float32 at 24 kHz within [-1, 1], and the words of the speaker ``moshi``.

    That speaker is on the left, and so is whoever is neither of the two; the other speaker is on the right.
    """
    parts: list[Samples] = []
    alignments: list[Alignment] = []
    gap = np.zeros((2, round(GAP * SAMPLE_RATE)), np.float32)
    place = 0
    for utterance in document.utterances:
        samples = read_audio(utterance.path, SAMPLE_RATE).numpy()
        if parts:
            parts.append(gap)
            place += gap.shape[1]
        part = np.zeros((2, samples.size), np.float32)
        # A recording that is loud up to the limit can exceed it once it is resampled.
        part[0 if utterance.speaker in (moshi, None) else 1] = samples / max(1.0, np.abs(samples).max())
        parts.append(part)
        if utterance.speaker == moshi and utterance.text:
            alignments += align(utterance.text, place, samples.size)
        place += samples.size
    return np.concatenate(parts, axis=1), alignments


def write_stereo(path: Path, samples: Samples) -> None:
    """16-bit wav at 24 kHz of ``samples [2, S]`` within [-1, 1]."""
    assert np.abs(samples).max() <= 1.0
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(2)
        handle.setsampwidth(2)
        handle.setframerate(SAMPLE_RATE)
        handle.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
