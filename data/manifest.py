"""moshi-finetune's manifests: the recordings that they list, and what is wrong with single lines.

A manifest is a jsonl file, which may be gzipped: each line ``{"path": "a.wav", "duration": 12.3}`` names a recording,
by its path from the manifest's folder and its seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moshi_ttt.configs.speakers import MAIN_SPEAKER
from moshi_ttt.core.deprecation import moved_names
from moshi_ttt.core.text_files import read_text
from moshi_ttt.data import audio_files
from moshi_ttt.data.audio_files import AudioError, Header
from moshi_ttt.data.problems import DataError, Problem
from moshi_ttt.data.text import TranscriptError, read_transcript
from moshi_ttt.data.words import WordCounts, count_words, total_words

if TYPE_CHECKING:
    from moshi_ttt.data.codec import SpeechCodec

Transcripts = Literal["required", "optional", "none"]
"""Whether every recording must have a transcript, may have one, or is read without."""
DURATION_SECONDS, DURATION_SHARE = 0.1, 0.01
"""How far a manifest's duration may be from the file's own: the larger of the two."""
LONGEST = 1e7
"""Seconds; no recording lasts longer than these four months."""
__getattr__ = moved_names(
    __name__,
    "moshi_ttt.data.sources",
    {name: f"moshi_ttt.data.problems:{name}" for name in ("LISTED", "check_share")},
)


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


def read_manifests(
    paths: Iterable[Path], codec: SpeechCodec, transcripts: Transcripts
) -> tuple[list[ManifestEntry], list[Problem]]:
    """``read_manifest`` of several manifests, for the model that ``codec`` belongs to."""
    entries: list[ManifestEntry] = []
    problems: list[Problem] = []
    for path in paths:
        found, wrong = read_manifest(
            path, transcripts=transcripts, channels=codec.channels, speaker=codec.speaker_label,
            frame_rate=float(codec.mimi.frame_rate),
        )  # fmt: skip
        entries += found
        problems += wrong
    return entries, problems


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
    """Warnings about the words of the sources of a data string; None stands for words that are not counted.

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
    """The properties of a recording. Raises DataError when it is not audio that can be read, or empty."""
    try:
        return audio_files.read_header(path)
    except AudioError as error:
        raise DataError(str(error)) from None
