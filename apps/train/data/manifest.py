"""Which recordings a run trains on: the data string of a config, and moshi-finetune's manifests behind it.

A manifest is a jsonl file: each line ``{"path": "a.wav", "duration": 12.3}`` names a recording, by its path from the
manifest's folder and its seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sphn

from moshi_ttt.apps.train.data.text import TranscriptError, read_words
from moshi_ttt.core.errors import MoshiTTTError

Transcripts = Literal["required", "optional", "none"]
"""Whether every recording must have a transcript, may have one, or is read without."""
SHARD_INDEX = "index.json"
"""The file by which a folder of pre-encoded shards is recognised."""
LISTED = 10
"""Problems that an error message spells out."""
DURATION_SECONDS, DURATION_SHARE = 0.1, 0.01
"""How far a manifest's duration may be from the file's own: the larger of the two."""


LONGEST = 1e7
"""Seconds; no recording lasts longer than these four months."""


class DataError(MoshiTTTError, ValueError):
    """Training data that cannot be used."""


@dataclass(frozen=True)
class SourceSpec:
    """One part of a data string: a manifest, a folder of manifests, or a folder of shards."""

    path: Path
    weight: float = 1.0

    @property
    def encoded(self) -> bool:
        """Whether it is a folder of pre-encoded shards."""
        return (self.path / SHARD_INDEX).is_file()

    @property
    def manifests(self) -> tuple[Path, ...]:
        """Its jsonl files, sorted by name; none for shards."""
        if self.encoded:
            return ()
        return tuple(sorted(self.path.glob("*.jsonl"))) if self.path.is_dir() else (self.path,)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a manifest (``line`` counts from 1)."""

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recording that can be used.

    Attributes:
        name: what its manifest calls it.
        manifest, line: where it is listed (``line`` counts from 1).
        seconds, channels: by the file's own header.
        transcript: the file with its words, or None.
    """

    name: str
    path: Path
    manifest: Path
    line: int
    seconds: float
    channels: int
    transcript: Path | None


class Header(NamedTuple):
    """How long a recording is, in seconds; its channels; its samples a second."""

    seconds: float
    channels: int
    rate: int


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """The sources that a data string such as ``a.jsonl:2,folder`` names, each with its weight (1 where none is said).

    Raises DataError: nothing is named, something does not exist, or a weight is not a number above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise DataError(
            f"data {text!r} {'has an empty part' if any(parts) else 'is empty'}. "
            "Give a jsonl manifest or a folder; several are joined by commas, with weights as in 'a.jsonl:2,b.jsonl:1'."
        )
    return tuple(_parse_source(part, text) for part in parts)


def read_manifest(
    path: Path, *, transcripts: Transcripts = "required", channels: int = 2
) -> tuple[list[Entry], list[Problem]]:
    """The recordings of a manifest that can be used, and what is wrong with the others; only headers are read.

    Args:
        transcripts: ``required``: a recording without one is a problem; ``optional``: it is read without; ``none``:
            transcripts are not looked at. A transcript lies beside its recording, with the suffix ``.json``.
        channels: the most that a recording may have.

    Raises DataError when the manifest itself cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a JSON text may hold what splitlines splits at
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a manifest ({error}). Give a jsonl file in UTF-8.") from None
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_read_entry(path, number, line, transcripts, channels))
        except (DataError, TranscriptError) as error:
            problems.append(Problem(path, number, str(error)))
    return entries, problems


def check_share(problems: Sequence[Problem], total: int, *, max_bad_share: float, text: str) -> None:
    """Raise DataError when more than ``max_bad_share`` of ``total`` recordings have problems, or none is left."""
    if not 0.0 <= max_bad_share < 1.0:
        raise DataError(f"data.max_bad_share = {max_bad_share}: allowed are shares from 0 to below 1, such as 0.01.")
    if total == 0:
        raise DataError(f"data {text!r} lists no recordings. Give a manifest with a line for each recording.")
    bad = len(problems)
    if bad < total and bad / total <= max_bad_share:
        return
    listed = [f"  {problem}" for problem in problems[:LISTED]]
    if bad > LISTED:
        listed.append(f"  and {bad - LISTED} more")
    advice = "No recording is left: mend them." if bad >= total else "Mend or remove them, or raise data.max_bad_share."
    raise DataError(
        f"data {text!r}: {bad} of {total} recordings ({bad / total:.1%}) cannot be used, and data.max_bad_share allows "
        f"{max_bad_share:.1%}:\n" + "\n".join(listed) + f"\n{advice}"
    )


def _parse_source(part: str, text: str) -> SourceSpec:
    path, weight = Path(part).expanduser(), 1.0
    if not path.exists():
        head, colon, tail = part.rpartition(":")
        if colon and Path(head).expanduser().exists():
            path, weight = Path(head).expanduser(), _weight(tail, text)
    if not path.exists():
        raise DataError(
            f"data {text!r}: {part!r} does not exist. Give a jsonl manifest, or a folder of them or of shards."
        )
    spec = SourceSpec(path, weight)
    if not spec.encoded and not spec.manifests:
        raise DataError(
            f"data {text!r}: the folder {part!r} has neither *.jsonl files nor a shard set's {SHARD_INDEX}."
        )
    return spec


def _weight(tail: str, text: str) -> float:
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"data {text!r}: the weight {tail!r} is not a number above 0. Write for instance a.jsonl:2.")
    return weight


def _read_entry(manifest: Path, number: int, line: str, transcripts: Transcripts, channels: int) -> Entry:
    """Raises DataError or TranscriptError with what is wrong and what to do, but not where."""
    name, duration = _read_line(line)
    path = manifest.parent / name
    if not path.is_file():
        raise DataError(f"{path} does not exist. A path is read from the manifest's folder.")
    seconds, found, _ = read_header(path)
    if abs(duration - seconds) > max(DURATION_SECONDS, DURATION_SHARE * seconds):
        raise DataError(f"{name} lasts {seconds:.2f} s, not {duration:g} s. Mend its duration, or the file.")
    if found > channels:
        raise DataError(
            f"{name} has {found} channels; this model takes {'one' if channels == 1 else 'one or two'}. "
            + ("Mix it down to mono." if channels == 1 else "Keep Moshi's on the left and the user's on the right.")
        )
    transcript = None if transcripts == "none" else path.with_suffix(".json")
    if transcript is not None and not transcript.is_file():
        if transcripts == "required":
            raise DataError(no_transcript(f"{name} has no transcript {transcript.name} beside it"))
        transcript = None
    if transcript is not None:
        read_words(transcript)
    return Entry(
        name=name, path=path, manifest=manifest, line=number, seconds=seconds, channels=found, transcript=transcript
    )


def no_transcript(what: str) -> str:
    """A sentence that starts with ``what``, and the ways to go on without a transcript."""
    return (
        f"{what}. Make one, or set data.transcripts to 'optional' (use those that exist) or 'none' (train audio alone)."
    )


def _read_line(line: str) -> tuple[str, float]:
    wanted = 'Expected: {"path": "a.wav", "duration": 12.3}.'
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"is not JSON ({error}). {wanted}") from None
    if not isinstance(values, dict):
        raise DataError(f"is {line.strip()[:60]!r}. {wanted}")
    missing = [key for key in ("path", "duration") if key not in values]
    if missing:
        raise DataError(f"has no {' and no '.join(missing)}. {wanted}")
    name, duration = values["path"], values["duration"]
    if not isinstance(name, str) or not name:
        raise DataError(f"path is {name!r}. {wanted}")
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < LONGEST:
        raise DataError(f"duration is {duration!r}; allowed are seconds above 0. {wanted}")
    return name, float(duration)


def read_header(path: Path) -> Header:
    """What a recording says about itself. Raises DataError when it is not audio, or empty."""
    try:
        reader = sphn.FileReader(str(path))
        header = Header(reader.duration_sec, reader.channels, reader.sample_rate)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged header can make the decoder panic, which is no Exception
        raise DataError(f"{path} cannot be read as audio ({error}). Convert it, for instance to wav.") from None
    if not header.seconds > 0:
        raise DataError(f"{path} has no samples. Remove it from the manifest.")
    return header
