"""Recall: a clip of a recording is presented twice, and a third time after a clip of another recording.

A model with memory has a lower loss in the second presentation. The contribution of attention is removed in two ways:
the first ``skip`` frames of each presentation are not counted (their attention context reaches before it), and the base
model's own gain is subtracted, recording by recording.

Shape legend: R recordings, P clips of all of them, Q rows of the language model, T frames of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.pieces import Piece, Row, heard_own, lay_out
from moshi_ttt.evaluation.statistics import Interval, bootstrap, mean_of_rows
from moshi_ttt.evaluation.subjects import Condition, Subject, listen
from moshi_ttt.evaluation.volumes import AtVolume, own_scales, refuse_volumes, require_base

HEARINGS = ("second", "third")
PLACES = {"first": 0, "second": 1, "third": 3}
"""The place of each presentation of A in A, A, B, A."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """The loss of the first presentation minus the loss of a later one, in nats per audio token.

    Attributes:
        hearing: ``second``, right after the first; ``third``, after another recording.
        values: ``[R]``, the mean over each recording's clips.
        losses: ``[R]``, of the later presentation itself.
    """

    subject: str
    condition: Condition
    hearing: str
    values: Tensor
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class ByPosition:
    """The loss of each presentation by frame within it, in nats per audio token.

    Attributes:
        losses: ``[3, T]``, first, second and third presentation: the mean over recordings, each of its clips. The
            last frames of the third are NaN: their late codebooks are never predicted.
    """

    subject: str
    condition: Condition
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What came out.

    Attributes:
        pieces: how many each of ``recordings`` had, ``asked`` at most.
        frames, skip: the length of a clip, and what is not counted of it.
        heard_own: by presentation, in how many clips ``memory of another`` has processed the clip's own recording; None
            where no model was evaluated under that condition.
        by_volume: of each model with blocks, volumes ascending; empty where none was asked for.
    """

    gains: list[Gains]
    by_position: list[ByPosition]
    recordings: list[str]
    left_out: list[str]
    asked: int
    pieces: list[int]
    frames: int
    skip: int
    heard_own: dict[str, int] | None
    seed: int
    by_volume: list[AtVolume] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, subject: str, condition: Condition, hearing: str) -> Gains:
        """The one of these names. Raises KeyError."""
        for gains in self.gains:
            if (gains.subject, gains.condition, gains.hearing) == (subject, condition, hearing):
                return gains
        raise KeyError((subject, condition, hearing))

    def gain(self, gains: Gains) -> Interval:
        """The mean over recordings."""
        return bootstrap(gains.values, mean_of_rows, seed=self.seed)

    def beyond_base(self, gains: Gains) -> Interval:
        """The mean beyond the base model's own gain."""
        base = self.of("base", "updates on", gains.hearing)
        return bootstrap(gains.values - base.values, mean_of_rows, seed=self.seed)

    def saved(self, gains: Gains) -> Interval:
        """How much lower the later loss is than the base model's: a gain can also come from a worse first loss."""
        base = self.of("base", "updates on", gains.hearing)
        return bootstrap(base.losses - gains.losses, mean_of_rows, seed=self.seed)


def evaluate(
    subjects: Sequence[Subject],
    documents: Sequence[Document],
    *,
    frames: int,
    conditions: Sequence[Condition],
    batch_size: int,
    pieces: int = 1,
    volumes: Sequence[float] = (),
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Recall:
    """Every model processes A, A, B, A for each clip A, where B is a clip of another recording.

    Each recording gives up to ``pieces`` clips of ``frames`` frames, one after the other from its beginning. The frames
    that are not counted are the attention context at the beginning of each presentation. ``memory reset`` and
    ``memory of another`` act between presentations. At the ``volumes``, models with blocks are evaluated with updates
    on, and the base model, which is the first of ``subjects`` then, once.

    Raises ConfigError when fewer than two recordings have a clip, or the context leaves nothing to count; and as
    ``refuse_volumes`` and ``require_base``.
    """
    skip = int(subjects[0].model.context or 0)
    kept, left_out = choose(documents, frames, pieces, skip)
    refuse_volumes(subjects, volumes)
    require_base(subjects, volumes, conditions)
    counts = [min(pieces, document.frames // frames) for document in kept]
    batches = lay_out(counts, batch_size, next_between=pieces == 1)  # so one piece of each gives the numbers it gave
    hearings = _Hearings(kept, batches, frames, skip, on_batch)
    gains, by_position, by_volume, exchanged = [], [], [], False
    base: Tensor | None = None
    for subject in subjects:
        with subject.present():  # once for all its conditions
            heard = {
                condition: hearings.losses(subject, condition)
                for condition in conditions
                if condition in subject.conditions
            }
            for condition, losses in heard.items():
                exchanged = exchanged or condition == "memory of another"
                gains += [hearings.gains(losses, subject.name, condition, hearing) for hearing in HEARINGS]
                mean = _without_late(subject.model, hearings.of_recordings(losses).nanmean(0)[list(PLACES.values())])
                by_position.append(ByPosition(subject=subject.name, condition=condition, losses=mean))
            if subject.name == "base":
                base = heard.get("updates on")
            for volume in volumes if subject.injection is not None else ():
                assert base is not None  # require_base
                losses = heard["updates on"] if volume == 1 else hearings.losses(subject, "updates on", volume)
                by_volume.append(hearings.at_volume(losses, base, subject, volume))
    return Recall(
        gains=gains, by_position=by_position, recordings=[document.name for document in kept], left_out=left_out,
        asked=pieces, pieces=counts, frames=frames, skip=skip, heard_own=heard_own(batches) if exchanged else None,
        seed=seed, by_volume=by_volume,
    )  # fmt: skip


@dataclass(frozen=True)
class _Hearings:
    """What everybody hears, and what is counted of it."""

    documents: Sequence[Document]
    batches: Sequence[Sequence[Row]]
    frames: int
    skip: int
    on_batch: Callable[[], None]

    def losses(self, subject: Subject, condition: Condition, volume: float = 1.0) -> Tensor:
        """``[P, 4, T]``: of A, A, B, A."""
        parts = []
        for rows in self.batches:
            codes = _heard(self.documents, rows, self.frames)
            parts.append(listen(subject, codes, condition, every=self.frames, volume=volume).audio)
            self.on_batch()
        losses: Tensor = torch.cat(parts).unflatten(1, (4, self.frames))
        return losses

    def of_recordings(self, values: Tensor) -> Tensor:
        """``[R, ...]``: the mean of each recording's pieces, of ``values [P, ...]``."""
        owners = torch.tensor([row.own.recording for rows in self.batches for row in rows])
        return torch.stack([values[owners == recording].nanmean(0) for recording in range(len(self.documents))])

    def counted(self, losses: Tensor) -> Tensor:
        """``[R]``: the mean loss of a hearing, ``losses [P, T]``."""
        return self.of_recordings(losses[:, self.skip :].nanmean(1))

    def gains(self, losses: Tensor, subject: str, condition: Condition, hearing: str) -> Gains:
        """Of ``losses [P, 4, T]``."""
        later = losses[:, PLACES[hearing]]
        return Gains(
            subject=subject, condition=condition, hearing=hearing, values=self.counted(losses[:, 0] - later),
            losses=self.counted(later),
        )  # fmt: skip

    def at_volume(self, losses: Tensor, base: Tensor, subject: Subject, volume: float) -> AtVolume:
        """Of ``losses [P, 4, T]``, beside the base model's."""
        saved, apart = losses[:, 0] - losses[:, 1], (losses - base).abs()
        return AtVolume(
            subject=subject.name,
            volume=volume,
            recall=self.counted(saved - (base[:, 0] - base[:, 1])),
            cost=self.counted(losses[:, 0] - base[:, 0]),
            saved=self.counted(base[:, 1] - losses[:, 1]),
            apart=float(torch.where(losses.isnan() & base.isnan(), 0, apart.nan_to_num(torch.inf)).max()),
            output_scales=own_scales(subject),
        )


def choose(documents: Sequence[Document], frames: int, pieces: int, skip: int) -> tuple[list[Document], list[str]]:
    """The recordings that have a clip, and a word on each that has none."""
    if pieces < 1:
        raise ConfigError(f"{pieces} clips of each recording: give 1 or more.")
    if frames <= skip + 1:
        raise ConfigError(
            f"A clip of {frames} frames has none beyond the attention context of {skip}. Give longer clips: --frames "
            f"{2 * skip} or more."
        )
    kept = [document for document in documents if document.frames >= frames]
    left_out = [f"{document.name} ({document.frames} frames)" for document in documents if document.frames < frames]
    if len(kept) < 2:
        raise ConfigError(
            f"Recall needs two recordings of {frames} frames or more, and {len(kept)} of {len(documents)} are as long. "
            "Give longer recordings, or a smaller --frames."
        )
    return kept, left_out


def _heard(documents: Sequence[Document], rows: Sequence[Row], frames: int) -> Tensor:
    """``[B, Q, 4 T]``: A, A, B, A of each row."""

    def codes(piece: Piece) -> Tensor:
        start = piece.number * frames
        return documents[piece.recording].codes[:, start : start + frames]

    return torch.stack(
        [torch.cat([codes(row.own), codes(row.own), codes(row.between), codes(row.own)], dim=1) for row in rows]
    )


def _without_late(model: Any, losses: Tensor) -> Tensor:
    """``losses [3, T]`` with NaN at the end of the third hearing, where the means lack the late codebooks."""
    late = max(model.delays[model.audio_offset : model.audio_offset + model.dep_q])
    losses[-1, losses.shape[1] - late :] = torch.nan
    return losses
