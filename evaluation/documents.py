"""The recordings of an evaluation, each from its beginning to its end.

Shape legend: B recordings, Q rows of the language model, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.paths import user_path
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.corpus import open_corpus
from moshi_ttt.data.manifest import Transcripts, read_header
from moshi_ttt.data.problems import DataError
from moshi_ttt.data.sources import SourceSpec, recordings_in

SEGMENT_FRAMES = 250
"""Mimi starts afresh so often (20 s): what it needs does not grow with a recording."""
Layout = Literal["files", "librilight"]


@dataclass(frozen=True)
class Document:
    """One recording: ``codes [Q, T]``."""

    name: str
    codes: Tensor

    @property
    def frames(self) -> int:
        return self.codes.shape[1]


def read_documents(
    data: str,
    codec: SpeechCodec,
    *,
    layout: Layout,
    transcripts: Transcripts,
    limit: int | None,
    report: Callable[[str], None] | None = None,
) -> list[Document]:
    """The recordings that ``data`` names, at most ``limit`` frames of each.

    Args:
        data: manifests or shards as a training names them, or a folder of recordings.
        layout: of a folder of recordings: ``files``, each a recording of its own; or ``librilight``,
            SPEAKER/BOOK/CHAPTER files, the chapters of a book joined in the order of their names.
        report: called with how many words the transcripts have, and with warnings.

    Raises DataError: nothing to read, or a recording that cannot be read.
    """
    folder = user_path(data)
    if folder.is_dir() and not SourceSpec(folder).encoded and not SourceSpec(folder).manifests:
        groups = _groups(folder, layout)
        return [Document(name, _join(files, codec, limit)) for name, files in groups.items()]
    corpus = open_corpus(data, codec, frames=SEGMENT_FRAMES, transcripts=transcripts, max_bad_share=0.0)
    if report is not None:
        if corpus.words is not None:
            report(f"{data}: {corpus.words}")
        for note in corpus.notes:
            report(f"Warning: {note}")
    found = []
    for number, source in enumerate(corpus.sources):
        for index, recording in enumerate(source.recordings):
            length = min(recording.frames, limit or recording.frames)
            segments = range(-(-length // SEGMENT_FRAMES))
            codes = torch.cat([corpus.codes(number, index, segment) for segment in segments], dim=1)  # [Q, T]
            found.append(Document(recording.name, codes[:, :length]))
    return found


def batches(documents: Sequence[Document], size: int, padding: int) -> Iterator[tuple[list[Document], Tensor]]:
    """``size`` documents at a time or a few more, longest first, and their codes ``[B, Q, T]``, padded at the end.

    No batch has a single document, unless there is only one.
    """
    ordered = sorted(documents, key=lambda document: (-document.frames, document.name))
    for rows in torch.arange(len(ordered)).tensor_split(max(1, len(ordered) // size)):
        chosen = [ordered[row] for row in rows.tolist()]
        longest = chosen[0].frames
        padded = [F.pad(document.codes, (0, longest - document.frames), value=padding) for document in chosen]
        yield chosen, torch.stack(padded)


def _groups(folder: Path, layout: Layout) -> dict[str, list[Path]]:
    files = recordings_in(folder)
    if layout == "files":
        return {str(path.relative_to(folder)): [path] for path in files}
    groups: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(folder).parts
        if len(parts) != 3:
            raise DataError(
                f"{path} does not lie as SPEAKER/BOOK/CHAPTER in {folder}. Give the folder above the speakers, "
                "or --layout files."
            )
        groups.setdefault("/".join(parts[:2]), []).append(path)
    return groups


def _join(files: Sequence[Path], codec: SpeechCodec, limit: int | None) -> Tensor:
    """``[Q, T]`` of files one after the other; without text."""
    parts: list[Tensor] = []
    length = 0
    for path in files:
        frames = codec.frames_of(read_header(path).seconds)
        for start in range(0, frames, SEGMENT_FRAMES):
            if limit is not None and length >= limit:
                break
            audio = codec.encode_segment(codec.read_segment(path, start, SEGMENT_FRAMES))
            parts.append(torch.cat([codec.encode_text(None, audio.shape[1])[None], audio]))
            length += audio.shape[1]
    return torch.cat(parts, dim=1)[:, :limit]
