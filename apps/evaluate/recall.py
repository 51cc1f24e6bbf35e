"""Recall: the same recording heard twice, and a third time after another one.

A model that remembers predicts the second hearing better. What attention alone contributes is kept out in two ways:
the first ``skip`` frames of each hearing are not counted (there attention still sees what came before), and the base
model's own gain is subtracted, recording by recording.

Shape legend: R recordings, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.apps.evaluate.documents import Document
from moshi_ttt.apps.evaluate.statistics import Interval, bootstrap
from moshi_ttt.apps.evaluate.subjects import Condition, Subject, listen
from moshi_ttt.core.errors import ConfigError

HEARINGS = ("second", "third")


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What a hearing saves against the first, in nats per audio token.

    Attributes:
        hearing: ``second``, right after the first; ``third``, after another recording.
        values: ``[R]``.
    """

    subject: str
    condition: Condition
    hearing: str
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What came out; ``frames`` is the length that was heard of each recording, ``skip`` what is not counted of it."""

    gains: list[Gains]
    recordings: list[str]
    left_out: list[str]
    frames: int
    skip: int
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


def evaluate(
    subjects: Sequence[Subject],
    documents: Sequence[Document],
    *,
    frames: int,
    conditions: Sequence[Condition],
    batch_size: int,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Recall:
    """Every subject hears A, A, B, A for each recording A, where B is the next one.

    ``frames`` of each recording are heard. The frames that are not counted are the attention's context at the beginning
    of each hearing. ``memory reset`` and ``memory of another`` act between hearings.

    Raises ConfigError when fewer than two recordings are long enough, or the context leaves nothing to count.
    """
    skip = int(subjects[0].model.context or 0)
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
    pieces = torch.stack([document.codes[:, :frames] for document in kept])
    heard = torch.cat([pieces, pieces, pieces.roll(-1, 0), pieces], dim=2)  # [R, Q, 4 frames]
    gains = []
    for subject in subjects:
        for condition in (each for each in conditions if each in subject.conditions):
            rows = []
            for part in heard.tensor_split(max(1, len(kept) // batch_size)):
                rows.append(listen(subject, part, condition, every=frames).audio)
                on_batch()
            hearings = torch.cat(rows).unflatten(1, (4, frames))[:, :, skip:]
            for hearing, place in zip(HEARINGS, (1, 3), strict=True):
                values = (hearings[:, 0] - hearings[:, place]).nanmean(1)
                gains.append(Gains(subject=subject.name, condition=condition, hearing=hearing, values=values))
    return Recall(
        gains=gains, recordings=[document.name for document in kept], left_out=left_out, frames=frames, skip=skip,
        seed=seed,
    )  # fmt: skip
