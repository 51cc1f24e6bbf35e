"""All recordings of a run as segments of tokens, encoded while they are read or read from shards.

Shape legend: Q rows of the language model (text, then C channels of K codebooks), T frames.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.manifest import ManifestEntry, Transcripts, check_words, listed_twice, no_transcript, read_manifests
from moshi_ttt.data.problems import DataError, Problem, check_share
from moshi_ttt.data.shards import EncodedRecording, ShardIndex, check_codec, read_index, read_tokens
from moshi_ttt.data.sources import SHARD_INDEX, SourceSpec, parse_sources
from moshi_ttt.data.text import TranscriptError, read_words
from moshi_ttt.data.words import WordCounts, total_words

CACHED_TEXTS = 64
"""Recordings of a source whose text stream is kept."""


class SegmentError(DataError):
    """A segment cannot be read, although the header of its recording could; ``problem`` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class SourceRecording:
    """A recording of ``frames`` frames in ``segments`` segments, listed in line ``line`` of ``manifest``."""

    name: str
    frames: int
    segments: int
    manifest: Path
    line: int

    @property
    def where(self) -> str:
        """Its place in the manifest, as in ``train.jsonl:17``."""
        return f"{self.manifest}:{self.line}"


class Source(ABC):
    """One part of a data string; ``weight`` is how often it is drawn from, relative to the other parts.

    ``words`` counts those of its transcripts; None where it has no transcripts, or nobody counted.
    """

    def __init__(
        self, spec: SourceSpec, recordings: Sequence[SourceRecording], words: WordCounts | None = None
    ) -> None:
        self.path = spec.path
        self.weight = spec.weight
        self.words = words
        self.recordings = tuple(recordings)
        self._first = [0, *accumulate(recording.segments for recording in self.recordings)]

    @property
    def num_segments(self) -> int:
        """Segments of all its recordings together."""
        return self._first[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The recording, and the segment in it, of the ``index``-th segment of the source."""
        assert 0 <= index < self.num_segments, index
        recording = bisect_right(self._first, index) - 1
        return recording, index - self._first[recording]

    def index(self, recording: int, segment: int) -> int:
        """The inverse of ``locate``."""
        return self._first[recording] + segment

    @abstractmethod
    def tokens(self, recording: int, start: int, frames: int) -> Tensor:
        """``[Q, T]``: ``frames`` frames from ``start`` on, fewer where the recording ends. Raises DataError."""


class ManifestSource(Source):
    """Recordings that Mimi encodes as they are read."""

    def __init__(self, spec: SourceSpec, entries: Sequence[ManifestEntry], codec: SpeechCodec, frames: int) -> None:
        self._entries = entries
        self._codec = codec
        self._text = lru_cache(maxsize=CACHED_TEXTS)(self._read_text)
        lengths = [codec.frames_of(entry.seconds) for entry in entries]
        super().__init__(
            spec,
            [
                _recording(entry.name, length, frames, entry.manifest, entry.line)
                for entry, length in zip(entries, lengths, strict=True)
            ],
            total_words(entry.words for entry in entries),
        )

    def tokens(self, recording: int, start: int, frames: int) -> Tensor:
        audio = self._codec.encode_segment(self._codec.read_segment(self._entries[recording].path, start, frames))
        return torch.cat([self._text(recording)[None, start : start + frames], audio])

    def _read_text(self, recording: int) -> Tensor:
        """``[T]``: the text row of a whole recording."""
        transcript = self._entries[recording].transcript
        words = None if transcript is None else read_words(transcript, self._codec.speaker_label)
        return self._codec.encode_text(words, self.recordings[recording].frames)


class ShardSource(Source):
    """Recordings that were encoded before; their segments are cut anew, of any length."""

    def __init__(
        self,
        spec: SourceSpec,
        encoded: Sequence[EncodedRecording],
        codec: SpeechCodec,
        frames: int,
        *,
        text: bool,
        words: WordCounts | None,
    ) -> None:
        self._encoded = encoded
        self._codec = codec
        self._with_text = text
        super().__init__(
            spec,
            [_recording(each.name, each.frames, frames, Path(each.manifest), each.line) for each in encoded],
            words if text else None,
        )

    def tokens(self, recording: int, start: int, frames: int) -> Tensor:
        audio, text = read_tokens(
            self.path, self._encoded[recording], start, start + frames, text=self._with_text
        )  # fmt: skip
        if text is None:
            text = self._codec.encode_text(None, audio.shape[1])
        return torch.cat([text[None], audio])


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything that one data string names, in segments of ``frames`` frames.

    Attributes:
        problems: recordings that were left out, for the caller to report.
        rows: Q.
        zero_token: what stands beyond a recording's end, in every row.
        encodes_on: the type of the device that Mimi encodes on while training; None when all comes from shards.
        notes: what a caller should know and could not see.
    """

    sources: tuple[Source, ...]
    problems: tuple[Problem, ...]
    frames: int
    rows: int
    zero_token: int
    frame_rate: float
    encodes_on: str | None
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Hexadecimal digits that differ between corpora with other recordings, as far as their lengths tell."""
        lengths = [(source.weight, [each.frames for each in source.recordings]) for source in self.sources]
        return hashlib.sha256(repr(lengths).encode()).hexdigest()

    @property
    def words(self) -> WordCounts | None:
        """The words of all transcripts together, as far as they are counted."""
        return total_words(source.words for source in self.sources)

    @property
    def num_segments(self) -> int:
        """Segments of all sources together."""
        return sum(source.num_segments for source in self.sources)

    @property
    def seconds(self) -> float:
        """Seconds of all recordings together."""
        frames = sum(recording.frames for source in self.sources for recording in source.recordings)
        return frames / self.frame_rate

    def codes(self, source: int, recording: int, segment: int) -> Tensor:
        """``[Q, T]`` int64 on the CPU: one segment; T is ``frames``, the rest of a last segment is the zero token.

        Raises SegmentError when the recording cannot be read there.
        """
        info = self.sources[source].recordings[recording]
        assert 0 <= segment < info.segments, (source, recording, segment)
        try:
            tokens = self.sources[source].tokens(recording, segment * self.frames, self.frames)
        except (DataError, TranscriptError) as error:
            raise SegmentError(Problem(info.manifest, info.line, str(error))) from None
        return F.pad(tokens, (0, self.frames - tokens.shape[1]), value=self.zero_token)


def open_corpus(
    text: str,
    codec: SpeechCodec,
    *,
    frames: int,
    transcripts: Transcripts = "required",
    max_bad_share: float = 0.01,
) -> Corpus:
    """Open the recordings that a data string names. Only their headers are read.

    Args:
        text: sources joined by commas, each with a weight where it is not 1 (see ``parse_sources``).
        frames: length of a segment.
        transcripts: whether every recording needs a transcript beside it, may have one, or is read without.
        max_bad_share: the largest share of all recordings that may be unusable.

    Raises DataError: a source cannot be read or has no recording left, shards are of another codec, or too many
    recordings are unusable (the first of them are listed), or transcripts are required and give no word.
    """
    if frames < 1:
        raise DataError(f"A segment of {frames} frames is none. Allowed: 1 and more; a longer duration_sec gives more.")
    fingerprint = cache(codec.fingerprint)  # it reads all of Mimi: once for all shards, and not without any
    opened = [_open_source(spec, codec, fingerprint, frames, transcripts) for spec in parse_sources(text)]
    sources = [each.source for each in opened]
    problems = [problem for each in opened for problem in each.problems]
    total = len(problems) + sum(len(source.recordings) for source in sources)
    check_share(problems, total, max_bad_share=max_bad_share, text=text)
    for source in sources:
        if not source.recordings:
            raise DataError(f"data {text!r}: {source.path} has no usable recording. Fix it, or leave it out.")
    counts = [(source.path, source.words) for source in sources]
    notes = [note for each in opened for note in each.notes]
    notes += check_words(counts, transcripts=transcripts, speaker=codec.speaker_label, text=text)
    notes += listed_twice([entry for each in opened for entry in each.listed])
    encodes = any(isinstance(source, ManifestSource) for source in sources)
    return Corpus(
        sources=tuple(sources), problems=tuple(problems), frames=frames, rows=codec.rows, zero_token=codec.zero_token,
        frame_rate=float(codec.mimi.frame_rate),
        encodes_on=next(codec.mimi.parameters()).device.type if encodes else None, notes=tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A source, the recordings of it that cannot be used, what to tell the user, and what its manifests list."""

    source: Source
    problems: Sequence[Problem]
    notes: Sequence[str] = ()
    listed: Sequence[ManifestEntry] = ()


def _open_source(
    spec: SourceSpec, codec: SpeechCodec, fingerprint: Callable[[], str], frames: int, transcripts: Transcripts
) -> _Opened:
    """Read the index of a folder of shards, or the manifests and the headers of their recordings."""
    if spec.encoded:
        return _open_shards(spec, codec, fingerprint(), frames, transcripts)
    entries, problems = read_manifests(spec.manifests, codec, transcripts)
    return _Opened(ManifestSource(spec, entries, codec, frames), problems, listed=entries)


def _open_shards(
    spec: SourceSpec, codec: SpeechCodec, fingerprint: str, frames: int, transcripts: Transcripts
) -> _Opened:
    index, with_text = read_index(spec.path), transcripts != "none"
    check_codec(spec.path, index, codec, fingerprint, text=with_text)
    encoded, problems = _with_text(spec, index, transcripts)
    notes = []
    if index.frames != frames:
        notes.append(
            f"{spec.path} was encoded in segments of {index.frames} frames and is read in segments of {frames}: the "
            "tokens differ a little from those of the recordings themselves, because Mimi started afresh elsewhere."
        )
    return _Opened(ShardSource(spec, encoded, codec, frames, text=with_text, words=index.words), problems, notes)


def _with_text(
    spec: SourceSpec, index: ShardIndex, transcripts: Transcripts
) -> tuple[list[EncodedRecording], list[Problem]]:
    """The recordings of a folder of shards, and what is wrong with those that lack the text they need."""
    if transcripts != "required":
        return list(index.recordings), []
    without = [
        Problem(Path(each.manifest), each.line, no_transcript(f"{each.name} has no text in {spec.path / SHARD_INDEX}"))
        for each in index.recordings
        if not each.has_text
    ]
    return [each for each in index.recordings if each.has_text], without


def _recording(name: str, length: int, frames: int, manifest: Path, line: int) -> SourceRecording:
    return SourceRecording(name=name, frames=length, segments=-(-length // frames), manifest=manifest, line=line)
