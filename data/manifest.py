"""Which recordings a run trains on: the data string of a config, and moshi-finetune's manifests behind it.

A manifest is a jsonl file, which may be gzipped: each line ``{"path": "a.wav", "duration": 12.3}`` names a recording,
by its path from the manifest's folder and its seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moshi_ttt.configs.speakers import MAIN_SPEAKER
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.text_files import read_text
from moshi_ttt.data import audio_files
from moshi_ttt.data.audio_files import AudioError, Header
from moshi_ttt.data.text import TranscriptError, read_transcript
from moshi_ttt.data.words import WordCounts, count_words, total_words
from moshi_ttt.hosts.moshi.tiny import SPEECH, speech_manifest

Transcripts = Literal["required", "optional", "none"]
"""Whether every recording must have a transcript, may have one, or is read without."""
SHARD_INDEX = "index.json"
"""The file by which a folder of pre-encoded shards is recognised."""
SUFFIXES = ("*.jsonl", "*.jsonl.gz")
"""What manifests are called."""
APPLE_DOUBLE = "._"
"""How the files begin that macOS lays beside others on a foreign disk: they have the names but not the contents."""
RECORDINGS = (".flac", ".mp3", ".ogg", ".wav")
"""How the names of recordings end, in small or capital letters."""
LISTED = 10
"""Problems that an error message spells out."""
DURATION_SECONDS, DURATION_SHARE = 0.1, 0.01
"""How far a manifest's duration may be from the file's own: the larger of the two."""


LONGEST = 1e7
"""Seconds; no recording lasts longer than these four months."""


class DataError(MoshiTTTError, ValueError):
    """Training data that cannot be used."""


def recordings_in(folder: Path) -> list[Path]:
    """The recordings in a folder and in those below it, by their paths. Raises DataError when there are none."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in RECORDINGS and path.is_file())
    files = sorted(path for path in found if not path.name.startswith(APPLE_DOUBLE))
    if not files:
        raise DataError(f"{folder} holds no recordings ({', '.join(RECORDINGS)}), no manifest and no shards.")
    return files


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
        """Its jsonl files, at any depth below a folder, sorted by path; none for shards."""
        if self.encoded:
            return ()
        if not self.path.is_dir():
            return (self.path,)
        found = (path for suffix in SUFFIXES for path in self.path.rglob(suffix) if path.is_file())
        return tuple(sorted(path for path in found if not path.name.startswith(APPLE_DOUBLE)))


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a manifest (``line`` counts from 1)."""

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class ManifestEntry:
    """A recording that can be used.

    Attributes:
        name: what its manifest calls it.
        manifest, line: where it is listed (``line`` counts from 1).
        seconds, channels: by the file's own header.
        transcript: the file with its words, or None.
        words: how many of them are used.
    """

    name: str
    path: Path
    manifest: Path
    line: int
    seconds: float
    channels: int
    transcript: Path | None
    words: WordCounts | None


def parse_sources(text: str) -> tuple[SourceSpec, ...]:
    """The sources that a data string such as ``a.jsonl:2,folder`` names, each with its weight (1 where none is said).

    Parts without anything in them are passed over: a comma may stand at the end.

    Raises DataError: nothing is named, something twice or what does not exist, or a weight is not a number above 0.
    """
    whole = text.strip()
    parts = [part.strip() for part in text.split(",")]
    if "," in whole and _exists(Path(whole).expanduser()):
        parts = [whole]
    if not any(parts):
        raise DataError(
            f"data {text!r} is empty. Give a jsonl manifest or a folder; several are joined by commas, with weights as "
            "in 'a.jsonl:2,b.jsonl:1'."
        )
    sources = tuple(_parse_source(part, text) for part in parts if part)
    paths = [source.path.resolve() for source in sources]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"data {text!r} names {path} twice. Give it once, with a weight, as in a.jsonl:2.")
    return sources


def read_manifest(
    path: Path,
    *,
    transcripts: Transcripts = "required",
    channels: int = 2,
    speaker: str = MAIN_SPEAKER,
    frame_rate: float = 12.5,
) -> tuple[list[ManifestEntry], list[Problem]]:
    """The recordings of a manifest that can be used, and what is wrong with the others; only headers are read.

    Args:
        transcripts: ``required``: a recording without one is a problem; ``optional``: it is read without; ``none``:
            transcripts are not looked at. A transcript lies beside its recording, with the suffix ``.json``.
        channels: the most that a recording may have.
        speaker: the label of those words that are used.
        frame_rate: frames a second of the text stream.

    Raises DataError when the manifest itself cannot be read.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a manifest ({error}). Give a jsonl file in UTF-8.") from None
    _refuse_whole_json(path, text)
    lines = text.split("\n")  # a JSON text may hold what splitlines splits at
    entries: list[ManifestEntry] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_read_entry(path, number, line, transcripts, channels, speaker, frame_rate))
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
    advice = "No recording is left: fix them." if bad >= total else "Fix or remove them, or raise data.max_bad_share."
    raise DataError(
        f"data {text!r}: {bad} of {total} recordings ({bad / total:.1%}) cannot be used, and data.max_bad_share allows "
        f"{max_bad_share:.1%}:\n" + "\n".join(listed) + f"\n{advice}"
    )


def listed_twice(entries: Sequence[ManifestEntry]) -> list[str]:
    """A warning about recordings that are listed more than once, where there are some."""
    seen: dict[str, ManifestEntry] = {}
    again = [entry for entry in entries if seen.setdefault(os.path.abspath(entry.path), entry) is not entry]
    if not again:
        return []
    first = seen[os.path.abspath(again[0].path)]
    return [
        f"{len(again)} recordings are listed more than once and are read as often, the first {again[0].name} at "
        f"{first.manifest}:{first.line} and {again[0].manifest}:{again[0].line}."
    ]


def check_words(
    counts: Sequence[tuple[Path, WordCounts | None]], *, transcripts: Transcripts, speaker: str, text: str
) -> list[str]:
    """What to warn of, given the words of each source of a data string; None is a source whose words nobody counted.

    Raises DataError when transcripts are required and all of them together have not one word that is used.
    """
    known = [(path, words) for path, words in counts if words is not None and words.transcripts]
    words = total_words(each for _, each in known)
    if words is None:
        return []
    if transcripts == "required" and not words.kept and len(known) == len(counts):
        raise DataError(
            f"data {text!r}: not one word of the transcripts is used, and Moshi would be trained to be silent: "
            f"{words}. {words.advice(speaker)} To train on audio alone, set data.transcripts to 'none'."
        )
    return [
        f"{path}: most words are not used: {each}. {each.advice(speaker)}"
        for path, each in known
        if each.dropped > each.kept or not each.kept
    ]


def _parse_source(part: str, text: str) -> SourceSpec:
    if part in SPEECH:
        return SourceSpec(speech_manifest(part))
    path, weight = Path(part).expanduser(), 1.0
    if not _exists(path):
        head, colon, tail = (each.strip() for each in part.rpartition(":"))  # the path itself may have colons
        if colon and _exists(Path(head).expanduser()):
            path, weight = Path(head).expanduser(), _weight(tail, text)
    if not _exists(path):
        raise DataError(
            f"data {text!r}: {part!r} does not exist. Give a jsonl manifest, or a folder of them or of shards."
        )
    spec = SourceSpec(path, weight)
    if not spec.encoded and not spec.manifests:
        raise DataError(
            f"data {text!r}: the folder {part!r} has no *.jsonl or *.jsonl.gz files at any depth, and no "
            f"{SHARD_INDEX} of shards. Give a manifest or a folder with one."
        )
    return spec


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long to be a path, or a null character in it
        return False


def _refuse_whole_json(path: Path, text: str) -> None:
    """Raise DataError when a manifest is one JSON value over several lines, or a list of recordings."""
    begins = text.lstrip()[:3]
    if not begins.startswith(("[", "{\n", "{\r\n")):
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return
    kind = "a list" if isinstance(whole, list) else "an object"
    raise DataError(
        f"{path} is one JSON value, {kind}; a manifest has one object a line, and no commas between them. Write it "
        f"anew, for instance: jq -c '{'.[]' if isinstance(whole, list) else '.'}' {path.name} > manifest.jsonl"
    )


def _weight(tail: str, text: str) -> float:
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"data {text!r}: the weight {tail!r} is not a number above 0. Write for instance a.jsonl:2.")
    return weight


def _read_entry(
    manifest: Path, number: int, line: str, transcripts: Transcripts, channels: int, speaker: str, frame_rate: float
) -> ManifestEntry:
    """Raises DataError or TranscriptError with what is wrong and what to do, but not where."""
    name, duration = _read_line(line)
    path = _find(manifest, name)
    header = read_header(path)
    _check_duration(name, duration, header)
    if header.channels > channels:
        raise DataError(
            f"{name} has {header.channels} channels; this model takes {'one' if channels == 1 else 'one or two'}. "
            + ("Mix it down to mono." if channels == 1 else "Keep Moshi's on the left and the user's on the right.")
        )
    transcript = None if transcripts == "none" else path.with_suffix(".json")
    if transcript is not None and not transcript.is_file():
        if transcripts == "required":
            raise DataError(no_transcript(f"{name} has no transcript {transcript.name} beside it"))
        transcript = None
    words = None
    if transcript is not None:
        words = count_words(read_transcript(transcript, speaker), header.seconds, frame_rate)
    return ManifestEntry(
        name=name, path=path, manifest=manifest, line=number, seconds=header.seconds, channels=header.channels,
        transcript=transcript, words=words,
    )  # fmt: skip


def _find(manifest: Path, name: str) -> Path:
    """The recording that a manifest calls ``name``. Raises DataError that says what lies there, or nearly there."""
    path = manifest.parent / (Path(name).expanduser() if name.startswith("~/") else name)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            raise DataError(f"{path} is a folder, and not a recording.")
        hint = "A path is read from the manifest's folder."
        if Path(name).is_file():
            hint = f"{name} is there from the folder in which you are, but a path is read from the manifest's folder."
        elif (manifest.parent / name.replace("\\", "/")).is_file():
            hint = "Write / between folders."
        elif (manifest.parent / name.strip()).is_file():
            hint = "Its path begins or ends with a blank: remove that."
    except OSError as error:
        raise DataError(f"{name[:80]!r} cannot be read ({error.strerror}).") from None
    raise DataError(f"{path} does not exist. {hint}")


def _check_duration(name: str, duration: float, header: Header) -> None:
    """Raise DataError when a manifest's duration is not the recording's, nor what its header gives out for it."""
    seconds = header.seconds
    stated = seconds if header.cut_off else header.stated  # what sphn.durations says of a whole file is no mistake
    if min(abs(duration - seconds), abs(duration - stated)) <= max(DURATION_SECONDS, DURATION_SHARE * seconds):
        return
    cut = f", though its header says {header.stated:.2f} s: it was cut off" if header.cut_off else ""
    milliseconds = abs(duration / 1000 - seconds) <= max(DURATION_SECONDS, DURATION_SHARE * seconds)
    advice = "Give the duration in seconds." if milliseconds else "Fix the duration in the manifest, or the file."
    raise DataError(f"{name} lasts {seconds:.2f} s{cut}, not {duration:g} s. {advice}")


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
        keys = f"; its keys are {', '.join(map(repr, values))}"[:200] if values else ""
        raise DataError(f"has no {' and no '.join(missing)}{keys}. {wanted}")
    name, duration = values["path"], values["duration"]
    if not isinstance(name, str) or not name:
        raise DataError(f"path is {name!r}. {wanted}")
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 < duration < LONGEST:
        raise DataError(f"duration is {duration!r}; allowed are seconds above 0. {wanted}")
    return name, float(duration)


def read_header(path: Path) -> Header:
    """What a recording is. Raises DataError when it is not audio that can be read, or empty."""
    try:
        return audio_files.read_header(path)
    except AudioError as error:
        raise DataError(str(error)) from None
