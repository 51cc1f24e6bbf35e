"""How many words of a corpus's transcripts become text of Moshi's, and why the others do not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import Field

from moshi_ttt.core.config import FrozenConfig
from moshi_ttt.data.text import Transcript, first_frame

LISTED_LABELS = 4
"""Labels of other speakers that a message names, the most frequent ones."""


class WordCounts(FrozenConfig):
    """Words of transcripts, each counted once: kept, or dropped for the first reason that holds.

    Attributes:
        transcripts, silent: transcripts, and those of them of which no word is kept.
        kept: words that give at least one text token.
        others: words of other speakers, by their label.
        backwards: words that do not end after their start.
        empty: words without text.
        outside: words that start after the end of their recording; ``if_milliseconds`` of them would start within it
            if times were milliseconds.
        replaced: words of which nothing is left, because a later word starts in the same frame.
    """

    transcripts: int = Field(default=0, ge=0)
    silent: int = Field(default=0, ge=0)
    kept: int = Field(default=0, ge=0)
    others: dict[str, int] = Field(default={})
    backwards: int = Field(default=0, ge=0)
    empty: int = Field(default=0, ge=0)
    outside: int = Field(default=0, ge=0)
    if_milliseconds: int = Field(default=0, ge=0)
    replaced: int = Field(default=0, ge=0)

    def __add__(self, other: WordCounts) -> WordCounts:
        sums: dict[str, Any] = {
            name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields if name != "others"
        }
        return WordCounts(others=dict(Counter(self.others) + Counter(other.others)), **sums)

    @property
    def dropped(self) -> int:
        return sum(self.others.values()) + self.backwards + self.empty + self.outside + self.replaced

    def __str__(self) -> str:
        reasons = [
            f"{number:,} {reason}"
            for number, reason in (
                (sum(self.others.values()), f"of other speakers: {self._labels()}"),
                (self.backwards, "that do not end after their start"),
                (self.empty, "without text"),
                (self.outside, "that start after their recording's end"),
                (self.replaced, "replaced by a later word that starts in the same 80 ms"),
            )
            if number
        ]
        said = f"{self.kept:,} words kept, {self.dropped:,} dropped"
        said += f" ({'; '.join(reasons)})" if reasons else ""
        return said + (f"; {self.silent:,} of {self.transcripts:,} transcripts keep none" if self.silent else "")

    def advice(self, speaker: str) -> str:
        """Sentences on what to look at, given which label is Moshi's; empty where most words are kept."""
        if self.kept > self.dropped:
            return ""
        sentences = []
        if sum(self.others.values()) > self.kept:
            sentences.append(
                f"data.speaker_label is {speaker!r}, and the transcripts have {self._labels()}: set it to the label of "
                f"the speaker who is Moshi{', if that is another' if self.kept else ''}."
            )
        if self.outside > self.kept:
            if 2 * self.if_milliseconds > self.outside:
                sentences.append("Are the times in milliseconds? They are read as seconds.")
            else:
                sentences.append("Times are seconds from the recording's start: are these transcripts of other files?")
        if self.backwards > self.kept:
            sentences.append("A word's times are [start, end], in seconds.")
        if self.empty > self.kept:
            sentences.append('A word\'s text comes first: ["word", [start, end], label].')
        if not (self.kept or self.dropped):
            sentences.append("Their lists of alignments are empty.")
        return " ".join(sentences)

    def _labels(self) -> str:
        common = Counter(self.others).most_common()
        more = f" and {len(common) - LISTED_LABELS} more labels" if len(common) > LISTED_LABELS else ""
        return ", ".join(f"{label!r} ({number:,})" for label, number in common[:LISTED_LABELS]) + more


def count_words(transcript: Transcript, seconds: float, frame_rate: float) -> WordCounts:
    """The words of the transcript of a recording of so many seconds, as ``text_stream`` uses them."""
    frames = math.ceil(seconds * frame_rate - 1e-6)
    counts: Counter[str] = Counter()
    firsts = [first_frame(word, frame_rate) for word in transcript.words]
    for place, (word, first) in enumerate(zip(transcript.words, firsts, strict=True)):
        following = firsts[place + 1] if place + 1 < len(firsts) else frames
        if not word.text.strip():
            counts["empty"] += 1
        elif first >= frames:
            counts["outside"] += 1
            counts["if_milliseconds"] += word.start / 1000 < seconds
        elif following <= first:
            counts["replaced"] += 1
        else:
            counts["kept"] += 1
    return WordCounts(
        transcripts=1, silent=int(not counts["kept"]), others=dict(transcript.others), backwards=transcript.backwards,
        **counts,
    )  # fmt: skip


def total_words(counts: Iterable[WordCounts | None]) -> WordCounts | None:
    """The sum of those that are counted; None where none is."""
    known = [each for each in counts if each is not None]
    return sum(known[1:], known[0]) if known else None
