"""Pre-encoded shards: the tokens of whole recordings on disk, so that Mimi need not run in every epoch.

A folder with ``index.json`` and ``shard_00000.safetensors``, ... In a shard each recording has ``KEY.audio [C * K, T]``
(int16) and, where it has a transcript, ``KEY.text [T]`` (int32); C channels, K codebooks, T frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.configs.speakers import MAIN_SPEAKER, Side
from moshi_ttt.core.config import FrozenConfig, parse_model
from moshi_ttt.core.deprecation import renamed_arguments
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.manifest import ManifestEntry, Transcripts, check_words, listed_twice, read_manifests
from moshi_ttt.data.problems import DataError, Problem, check_share
from moshi_ttt.data.sources import SHARD_INDEX, parse_sources
from moshi_ttt.data.text import TranscriptError, read_words
from moshi_ttt.data.words import WordCounts, total_words
from moshi_ttt.system.output_folder import new_folder

FORMAT_VERSION: Literal[1] = 1
SHARD_SIZE = 256
"""Recordings in a shard."""
AGAIN = "Encode the recordings again."

_Form = tuple[str, list[int]]
"""The dtype and shape of a stored tensor."""


class EncodedRecording(FrozenConfig):
    """Where a recording's ``frames`` tokens are, under ``key`` in the file ``shard``; and where it came from."""

    name: str
    shard: str = Field(pattern=r"^shard_\d+\.safetensors$")
    key: str
    frames: int = Field(ge=1)
    has_text: bool
    manifest: str
    line: int = Field(ge=1)


class ShardIndex(FrozenConfig):
    """The contents of ``index.json``. ``fingerprint`` is the codec's; Mimi restarts every ``frames`` frames.

    ``moshi_channel`` and ``speaker_label`` say which channel and whose words were taken for Moshi's, ``words`` how many
    words the transcripts had; shards of before these were known have their first values.
    """

    format_version: Literal[1]
    frames: int = Field(ge=1)
    fingerprint: str
    frame_rate: float = Field(gt=0.0)
    codebooks: int = Field(ge=1)
    channels: Literal[1, 2]
    transcripts: Transcripts
    moshi_channel: Side = "left"
    speaker_label: str = MAIN_SPEAKER
    words: WordCounts | None = None
    recordings: tuple[EncodedRecording, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What ``write_shards`` wrote, the recordings that it had to leave out, and what else a caller should know."""

    recordings: int
    frames: int
    seconds: float
    shards: int
    bytes: int
    words: WordCounts | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def write_shards(
    source: str,
    out: Path,
    codec: SpeechCodec,
    *,
    frames: int,
    transcripts: Transcripts = "required",
    max_bad_share: float = 0.01,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[int, int, str], None] | None = None,
    made_by: str = "moshi-ttt encode",
) -> ShardSummary:
    """Encode every recording of the data string ``source`` into the new folder ``out``; it appears whole or not at all.

    Args:
        source: manifests, or folders of them, without weights.
        frames: length of a segment: Mimi starts afresh at each, as it does in training on the manifests themselves.
        transcripts, max_bad_share: as for ``open_corpus``.
        shard_size: recordings in a shard.
        progress: called with the number of recordings done, the number of all, and the name of the last.

    Raises DataError, or OutputError when ``out`` is not new or empty.
    """
    if frames < 1 or shard_size < 1:
        raise DataError(f"frames = {frames} and shard_size = {shard_size}: both are whole numbers from 1 on.")
    with new_folder(out, made_by=made_by) as folder:
        entries, problems, notes = _list(source, codec, transcripts, max_bad_share)
        total = len(entries) + len(problems)
        writer = _Writer(folder, shard_size)
        counts: list[WordCounts | None] = []
        for done, entry in enumerate(entries, start=1):
            try:
                writer.add(entry.name, (entry.manifest, entry.line), *_encode(entry, codec, frames))
                counts.append(entry.words)
            except (DataError, TranscriptError) as error:
                problems.append(Problem(entry.manifest, entry.line, str(error)))
                check_share(problems, total, max_bad_share=max_bad_share, text=source)
            if progress is not None:
                progress(done, len(entries), entry.name)
        writer.flush()
        index = ShardIndex(
            format_version=FORMAT_VERSION, frames=frames, fingerprint=codec.fingerprint(),
            frame_rate=float(codec.mimi.frame_rate), codebooks=codec.codebooks, channels=_one_or_two(codec.channels),
            transcripts=transcripts, moshi_channel=codec.moshi_channel, speaker_label=codec.speaker_label,
            words=total_words(counts), recordings=tuple(writer.recordings),
        )  # fmt: skip
        (folder / SHARD_INDEX).write_text(json.dumps(index.model_dump(mode="json"), indent=1), encoding="utf-8")
        written = sum(path.stat().st_size for path in folder.iterdir())
    encoded = sum(recording.frames for recording in index.recordings)
    return ShardSummary(
        recordings=len(index.recordings), frames=encoded, seconds=encoded / index.frame_rate, shards=writer.shards,
        bytes=written, words=index.words, problems=tuple(problems), notes=tuple(notes),
    )  # fmt: skip


@renamed_arguments(pieces="clips")
def rearrange_shards(
    source: Path,
    out: Path,
    clips: Callable[[int], Iterable[Tensor]],
    *,
    shard_size: int = SHARD_SIZE,
    made_by: str = "rearrange_shards",
) -> ShardIndex:
    """A new folder of shards, whose recordings are made of frames of those in ``source``; whole or not there at all.

    Args:
        clips: from the number of frames of a recording to the frames ``[T]`` (int64) of each new recording.

    Raises DataError as ``read_index``, or when no clip can be made of any recording; OutputError as ``new_folder``.
    """
    index = read_index(source)
    with new_folder(out, made_by=made_by) as folder:
        writer = _Writer(folder, shard_size)
        for recording in index.recordings:
            audio, text = read_tokens(source, recording, 0, recording.frames, text=True)
            for number, frames in enumerate(clips(recording.frames)):
                name, where = f"{recording.name}#{number}", (Path(recording.manifest), recording.line)
                writer.add(name, where, audio[:, frames], None if text is None else text[frames])
        writer.flush()
        if not writer.recordings:
            longest = max(recording.frames for recording in index.recordings)
            raise DataError(f"{source}: no clip can be made of any recording; the longest has {longest} frames.")
        made = index.model_copy(update={"recordings": tuple(writer.recordings), "words": None})
        (folder / SHARD_INDEX).write_text(json.dumps(made.model_dump(mode="json"), indent=1), encoding="utf-8")
    return made


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards, compared with the headers of all its files.

    Raises DataError: no index, another format version, or a file that is missing, damaged or not as the index says.
    """
    path = folder / SHARD_INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). {AGAIN}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format_version {version!r}, and this moshi-ttt reads {FORMAT_VERSION}. {AGAIN[:-1]} with it."
        )
    try:
        index = parse_model(ShardIndex, values, str(path))
    except ConfigError as error:
        raise DataError(f"{error}\n{AGAIN}") from None
    expected: dict[str, dict[str, _Form]] = {}
    for recording in index.recordings:
        forms = expected.setdefault(recording.shard, {})
        forms[f"{recording.key}.audio"] = ("I16", [index.channels * index.codebooks, recording.frames])
        if recording.has_text:
            forms[f"{recording.key}.text"] = ("I32", [recording.frames])
    for name, forms in expected.items():
        found = _forms(folder / name)
        wrong = sorted(key for key in forms.keys() | found.keys() if forms.get(key) != found.get(key))
        if wrong:
            raise DataError(f"{folder / name} does not hold what {SHARD_INDEX} says: {', '.join(wrong[:5])}. {AGAIN}")
    return index


def check_codec(folder: Path, index: ShardIndex, codec: SpeechCodec, fingerprint: str, *, text: bool = True) -> None:
    """Raise DataError unless the shards were made with this codec, whose fingerprint is given.

    ``text`` says whether their text is used: else it does not matter whose it is.
    """
    ours = (codec.channels, codec.codebooks, float(codec.mimi.frame_rate))
    theirs = (index.channels, index.codebooks, index.frame_rate)
    if ours != theirs:
        names = "{} channels of {} codebooks at {:g} Hz"
        raise DataError(f"{folder} holds {names.format(*theirs)}; the model has {names.format(*ours)}. {AGAIN}")
    others: list[tuple[str, str, str]] = []
    if index.moshi_channel != codec.moshi_channel and index.channels == 2:
        others.append(("data.moshi_channel", index.moshi_channel, codec.moshi_channel))
    if index.speaker_label != codec.speaker_label and text and any(each.has_text for each in index.recordings):
        others.append(("data.speaker_label", index.speaker_label, codec.speaker_label))
    if others:
        listed = " and ".join(f"{key} {theirs!r}, and is read with {wanted!r}" for key, theirs, wanted in others)
        raise DataError(f"{folder} was encoded with {listed}. Set the same, or encode the recordings again.")
    if index.fingerprint != fingerprint:
        raise DataError(
            f"{folder} was encoded with another Mimi or tokenizer ({index.fingerprint[:12]}) than the model's "
            f"({fingerprint[:12]}). {AGAIN[:-1]} with this model's."
        )


def read_tokens(
    folder: Path, recording: EncodedRecording, start: int, stop: int, *, text: bool
) -> tuple[Tensor, Tensor | None]:
    """Frames ``start`` to ``stop`` (or the end) of a recording: audio ``[C * K, T]`` and text ``[T]``, int64.

    The text is None where the recording has none, or ``text`` is false. Raises DataError.
    """
    try:
        with safe_open(folder / recording.shard, framework="pt") as handle:  # type: ignore[no-untyped-call]
            audio: Tensor = handle.get_slice(f"{recording.key}.audio")[:, start:stop]
            words: Tensor | None = None
            if text and recording.has_text:
                words = handle.get_slice(f"{recording.key}.text")[start:stop].to(torch.int64)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / recording.shard} cannot be read ({error}). {AGAIN}") from None
    return audio.to(torch.int64), words


@dataclass
class _Writer:
    """Collects recordings and writes a shard whenever it has enough."""

    folder: Path
    shard_size: int
    shards: int = 0
    recordings: list[EncodedRecording] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    waiting: int = 0

    def add(self, name: str, where: tuple[Path, int], audio: Tensor, text: Tensor | None) -> None:
        """``audio [C * K, T]`` and ``text [T]`` of a recording listed in a line of a manifest."""
        assert int(audio.max()) < 2**15, audio.max()
        key = f"{len(self.recordings):08d}"
        self.tensors[f"{key}.audio"] = audio.to(torch.int16)
        if text is not None:
            self.tensors[f"{key}.text"] = text.to(torch.int32)
        self.recordings.append(
            EncodedRecording(
                name=name, shard=self._name(), key=key, frames=audio.shape[1], has_text=text is not None,
                manifest=str(where[0]), line=where[1],
            )
        )  # fmt: skip
        self.waiting += 1
        if self.waiting == self.shard_size:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            save_file(self.tensors, self.folder / self._name())
            self.shards, self.waiting, self.tensors = self.shards + 1, 0, {}

    def _name(self) -> str:
        return f"shard_{self.shards:05d}.safetensors"


def _list(
    source: str, codec: SpeechCodec, transcripts: Transcripts, max_bad_share: float
) -> tuple[list[ManifestEntry], list[Problem], list[str]]:
    """The recordings that a data string names, what is wrong with others, and what to warn of."""
    counts: list[tuple[Path, WordCounts | None]] = []
    entries: list[ManifestEntry] = []
    problems: list[Problem] = []
    for spec in parse_sources(source):
        if spec.encoded:
            raise DataError(f"{spec.path} is encoded already: give the manifest that it was made from.")
        if spec.weight != 1.0:
            raise DataError(f"data {source!r}: the weight {spec.weight:g} means nothing here: give it to the training.")
        good, bad = read_manifests(spec.manifests, codec, transcripts)
        entries += good
        problems += bad
        counts.append((spec.path, total_words(entry.words for entry in good)))
    check_share(problems, len(entries) + len(problems), max_bad_share=max_bad_share, text=source)
    notes = check_words(counts, transcripts=transcripts, speaker=codec.speaker_label, text=source)
    return entries, problems, notes + listed_twice(entries)


def _encode(entry: ManifestEntry, codec: SpeechCodec, frames: int) -> tuple[Tensor, Tensor | None]:
    """``[C * K, T]`` and ``[T]`` of a whole recording, encoded segment by segment."""
    length = codec.frames_of(entry.seconds)
    parts = [codec.encode_segment(codec.read_segment(entry.path, start, frames)) for start in range(0, length, frames)]
    text = (
        None
        if entry.transcript is None
        else codec.encode_text(read_words(entry.transcript, codec.speaker_label), length)
    )
    return torch.cat(parts, dim=1), text


def _forms(path: Path) -> dict[str, _Form]:
    try:
        with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            return {key: (each.get_dtype(), list(each.get_shape())) for key, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}). {AGAIN}") from None


def _one_or_two(channels: int) -> Any:
    assert channels in (1, 2), channels
    return channels
