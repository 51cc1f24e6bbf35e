"""Recall: the same piece of a recording heard twice, and a third time after a piece of another one.

A model that remembers predicts the second hearing better. What attention alone contributes is kept out in two ways:
the first ``skip`` frames of each hearing are not counted (there attention still sees what came before), and the base
model's own gain is subtracted, recording by recording.

Shape legend: R recordings, P pieces of all of them, Q rows of the language model, T frames of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.apps.evaluate.documents import Document
from moshi_ttt.apps.evaluate.pieces import Piece, Row, heard_own, lay_out
from moshi_ttt.apps.evaluate.statistics import Interval, bootstrap
from moshi_ttt.apps.evaluate.subjects import Condition, Subject, listen
from moshi_ttt.core.errors import ConfigError

HEARINGS = ("second", "third")
PLACES = {"first": 0, "second": 1, "third": 3}
"""Where each hearing of A is in A, A, B, A."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What a hearing saves against the first, in nats per audio token.

    Attributes:
        hearing: ``second``, right after the first; ``third``, after another recording.
        values: ``[R]``, the mean over each recording's pieces.
        losses: ``[R]``, of the hearing itself.
    """

    subject: str
    condition: Condition
    hearing: str
    values: Tensor
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class ByPosition:
    """The loss of each hearing by frame within it, in nats per audio token.

    Attributes:
        losses: ``[3, T]``, first, second and third hearing: the mean over recordings, each the mean of its pieces. The
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
        frames, skip: the length of a piece, and what is not counted of it.
        heard_own: by hearing, in how many pieces ``memory of another`` had heard the piece's own recording; None where
            nobody was heard under that condition.
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
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, subject: str, condition: Condition, hearing: str) -> Gains:
        """The one of these names. Raises KeyError."""
        for gains in self.gains:
            if (gains.subject, gains.condition, gains.hearing) == (subject, condition, hearing):
                return gains
        raise KeyError((subject, condition, hearing))

    def gain(self, gains: Gains) -> Interval:
        """The mean over recordings."""
        return bootstrap(gains.values, lambda values: values.mean(1), seed=self.seed)

    def beyond_base(self, gains: Gains) -> Interval:
        """The mean beyond the base model's own gain."""
        base = self.of("base", "updates on", gains.hearing)
        return bootstrap(gains.values - base.values, lambda values: values.mean(1), seed=self.seed)

    def saved(self, gains: Gains) -> Interval:
        """What the hearing itself costs less than the base model's: a gain can also come of a worse first hearing."""
        base = self.of("base", "updates on", gains.hearing)
        return bootstrap(base.losses - gains.losses, lambda values: values.mean(1), seed=self.seed)


def evaluate(
    subjects: Sequence[Subject],
    documents: Sequence[Document],
    *,
    frames: int,
    conditions: Sequence[Condition],
    batch_size: int,
    pieces: int = 1,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Recall:
    """Every subject hears A, A, B, A for each piece A, where B is a piece of another recording.

    Of each recording up to ``pieces`` pieces of ``frames`` frames are heard, one after the other from its beginning.
    The frames that are not counted are the attention's context at the beginning of each hearing. ``memory reset`` and
    ``memory of another`` act between hearings.

    Raises ConfigError when fewer than two recordings have a piece, or the context leaves nothing to count.
    """
    skip = int(subjects[0].model.context or 0)
    kept, left_out = _choose(documents, frames, pieces, skip)
    counts = [min(pieces, document.frames // frames) for document in kept]
    batches = lay_out(counts, batch_size, next_between=pieces == 1)  # so one piece of each gives the numbers it gave
    owners = torch.tensor([row.own.recording for rows in batches for row in rows])

    def of_recordings(values: Tensor) -> Tensor:
        """``[R, ...]``: the mean of each recording's pieces, of ``values [P, ...]``."""
        return torch.stack([values[owners == recording].nanmean(0) for recording in range(len(kept))])

    gains, by_position, exchanged = [], [], False
    for subject in subjects:
        with subject.present():  # once for all its conditions
            for condition in (each for each in conditions if each in subject.conditions):
                exchanged = exchanged or condition == "memory of another"
                parts = []
                for rows in batches:
                    parts.append(listen(subject, _heard(kept, rows, frames), condition, every=frames).audio)
                    on_batch()
                losses = torch.cat(parts).unflatten(1, (4, frames))  # [P, 4, T]
                for hearing in HEARINGS:
                    saved = (losses[:, 0] - losses[:, PLACES[hearing]])[:, skip:].nanmean(1)
                    own = of_recordings(losses[:, PLACES[hearing], skip:].nanmean(1))
                    gains.append(
                        Gains(
                            subject=subject.name, condition=condition, hearing=hearing, values=of_recordings(saved),
                            losses=own,
                        )
                    )  # fmt: skip
                mean = _without_late(subject.model, of_recordings(losses).nanmean(0)[list(PLACES.values())])
                by_position.append(ByPosition(subject=subject.name, condition=condition, losses=mean))
    return Recall(
        gains=gains, by_position=by_position, recordings=[document.name for document in kept], left_out=left_out,
        asked=pieces, pieces=counts, frames=frames, skip=skip, heard_own=heard_own(batches) if exchanged else None,
        seed=seed,
    )  # fmt: skip


def _choose(documents: Sequence[Document], frames: int, pieces: int, skip: int) -> tuple[list[Document], list[str]]:
    """The recordings that have a piece, and a word on each that has none."""
    if pieces < 1:
        raise ConfigError(f"{pieces} pieces of each recording: give 1 or more.")
    if frames <= skip + 1:
        raise ConfigError(
            f"Of {frames} frames none is left beyond the attention's context of {skip}. Hear longer pieces: --frames "
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
