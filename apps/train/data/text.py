"""Moshi's text stream: the words that Moshi says, as tokens at the frames in which they are said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError

MAIN_SPEAKER = "SPEAKER_MAIN"
"""Whom the language model speaks for; what others say is not part of its text."""
EXPECTED = f'{{"alignments": [["word", [start, end], "{MAIN_SPEAKER}"], ...]}}, times in seconds'


class TranscriptError(MoshiTTTError, ValueError):
    """A transcript that cannot be read."""


class Word(NamedTuple):
    """A word and when it is said, in seconds from the recording's first sample."""

    text: str
    start: float
    end: float


def read_words(path: Path) -> tuple[Word, ...]:
    """The main speaker's words of a transcript, by their start; words that do not end after their start are left out.

    Raises TranscriptError: no such file, not JSON, or not laid out as ``EXPECTED``.
    """
    try:
        transcript = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TranscriptError(f"transcript {path} cannot be read ({error}). Expected: {EXPECTED}.") from None
    alignments = transcript.get("alignments") if isinstance(transcript, dict) else None
    if not isinstance(alignments, list):
        raise TranscriptError(f"transcript {path} has no list of alignments. Expected: {EXPECTED}.")
    words = []
    for number, alignment in enumerate(alignments):
        match alignment:
            case [str(text), [start, end], speaker] if _is_time(start) and _is_time(end):
                if speaker == MAIN_SPEAKER and start < end:
                    words.append(Word(text, float(start), float(end)))
            case _:
                raise TranscriptError(
                    f"transcript {path}: alignment {number} is {str(alignment)[:60]!r}. Expected: {EXPECTED}."
                )
    return tuple(sorted(words, key=lambda word: word.start))


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
    first_frames = [max(0, math.floor(word.start * frame_rate)) for word in words] + [frames]
    for number, word in enumerate(words):
        first, stop = first_frames[number], first_frames[number + 1]
        tokens = tokenizer.encode(word.text.strip())[: max(0, min(stop, frames) - first)]
        stream[first : first + len(tokens)] = tokens
        if tokens and first > 0 and stream[first - 1] == padding:
            stream[first - 1] = end_of_padding
    return torch.tensor(stream, dtype=torch.int64)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e7
