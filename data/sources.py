"""The data string of a config, such as ``a.jsonl:2,folder``: manifests, folders of manifests, folders of shards.

Each part has a weight: how often it is drawn from, relative to the other parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from moshi_ttt.data.problems import DataError
from moshi_ttt.hosts.moshi.tiny import SPEECH, speech_manifest

SHARD_INDEX = "index.json"
"""The file by which a folder of pre-encoded shards is recognized."""
SUFFIXES = ("*.jsonl", "*.jsonl.gz")
"""What manifests are called."""
APPLE_DOUBLE = "._"
"""How the files begin that macOS lays beside others on a foreign disk: they have the names but not the contents."""
RECORDINGS = (".flac", ".mp3", ".ogg", ".wav")
"""How the names of recordings end, in small or capital letters."""


def recordings_in(folder: Path) -> list[Path]:
    """The recordings in a folder and in those below it, by their paths. Raises DataError if there are none."""
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


def _weight(tail: str, text: str) -> float:
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"data {text!r}: the weight {tail!r} is not a number above 0. Write for instance a.jsonl:2.")
    return weight


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long to be a path, or a null character in it
        return False
