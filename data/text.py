"""Moshi's text stream: the words that Moshi says, as tokens at the frames in which they are said."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moshi_ttt.configs.speakers import MAIN_SPEAKER
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.text_files import read_text

EXPECTED = f'{{"alignments": [["word", [start, end], "{MAIN_SPEAKER}"], ...]}}, times in seconds'


class TranscriptError(MoshiTTTError, ValueError):
    """A transcript that cannot be read."""


class Word(NamedTuple):
    """A word and when it is said, in seconds from the recording's first sample."""

    text: str
    start: float
    end: float


class Transcript(NamedTuple):
    """The words of one speaker, by their start, and how many more a transcript has.

    Attributes:
        others: words of other speakers, by their label.
        backwards: words of the speaker that do not end after their start.
    """

    words: tuple[Word, ...]
    others: Counter[str]
    backwards: int


def read_transcript(path: Path, speaker: str = MAIN_SPEAKER) -> Transcript:
    """The words of a transcript that ``speaker`` says.

    Raises TranscriptError: no such file, not JSON, or not laid out as ``EXPECTED``.
    """
    try:
        transcript = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise TranscriptError(f"transcript {path} cannot be read ({error}). Expected: {EXPECTED}.") from None
    alignments = transcript.get("alignments") if isinstance(transcript, dict) else None
    if not isinstance(alignments, list):
        keys = f"; its keys are {', '.join(map(repr, transcript))}"[:200] if isinstance(transcript, dict) else ""
        raise TranscriptError(f"transcript {path} has no list of alignments{keys}. Expected: {EXPECTED}.")
    words: list[Word] = []
    others: Counter[str] = Counter()
    backwards = 0
    for number, alignment in enumerate(alignments):
        match alignment:
            case [str(text), [start, end], label] if _is_time(start) and _is_time(end):
                if label != speaker:
                    others[str(label)] += 1
                elif start < end:
                    words.append(Word(text, float(start), float(end)))
                else:
                    backwards += 1
            case _:
                raise TranscriptError(
                    f"transcript {path}: alignment {number} is {str(alignment)[:60]!r}. Expected: {EXPECTED}."
                )
    return Transcript(tuple(sorted(words, key=lambda word: word.start)), others, backwards)


def read_words(path: Path, speaker: str = MAIN_SPEAKER) -> tuple[Word, ...]:
    """The words of ``read_transcript`` alone."""
    return read_transcript(path, speaker).words


def first_frame(word: Word, frame_rate: float) -> int:
    """The frame in which a word starts."""
    return max(0, math.floor(word.start * frame_rate))


def text_stream(
    words: Sequence[Word], frames: int, tokenizer: Any, *, frame_rate: float, padding: int, end_of_padding: int
) -> Tensor:
    """``[frames]`` int64 on the CPU: the text row of a whole recording.

    A word is due in the frame in which it starts, and replaces what is left of an earlier one. From there on each of
    its tokens takes a frame. Where the frame before its first token is padding, that frame says ``end_of_padding``;
    every other frame is ``padding``.

    Args:
        words: by their start, which is in seconds. What starts beyond the last frame is dropped.
        tokenizer: a ``SentencePieceProcessor``.
        frame_rate: frames a second.
    """
    stream = [padding] * frames
    first_frames = [first_frame(word, frame_rate) for word in words] + [frames]
    for number, word in enumerate(words):
        first, stop = first_frames[number], first_frames[number + 1]
        tokens = tokenizer.encode(word.text.strip())[: max(0, min(stop, frames) - first)]
        stream[first : first + len(tokens)] = tokens
        if tokens and first > 0 and stream[first - 1] == padding:
            stream[first - 1] = end_of_padding
    return torch.tensor(stream, dtype=torch.int64)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e7
