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

from moshi_ttt.core.deprecation import renamed_arguments, renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.clips import Clip, Row, lay_out, processed_own
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import Condition, ModelUnderTest, evaluate_codes
from moshi_ttt.evaluation.statistics import Interval, bootstrap, mean_of_rows
from moshi_ttt.evaluation.volumes import AtVolume, own_scales, refuse_volumes, require_base

LATER = ("second", "third")
PLACES = {"first": 0, "second": 1, "third": 3}
"""The place of each presentation of A in A, A, B, A."""


@renamed_attributes(subject="model", hearing="presentation")
@dataclass(frozen=True, kw_only=True)
class Gains:
    """The loss of the first presentation minus the loss of a later one, in nats per audio token.

    Attributes:
        presentation: ``second``, right after the first; ``third``, after another recording.
        values: ``[R]``, the mean over each recording's clips.
        losses: ``[R]``, of the later presentation itself.
    """

    model: str
    condition: Condition
    presentation: str
    values: Tensor
    losses: Tensor


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class ByPosition:
    """The loss of each presentation by frame within it, in nats per audio token.

    Attributes:
        losses: ``[3, T]``, first, second and third presentation: the mean over recordings, each of its clips. The
            last frames of the third are NaN: their late codebooks are never predicted.
    """

    model: str
    condition: Condition
    losses: Tensor


@renamed_attributes(pieces="clips", heard_own="processed_own")
@dataclass(frozen=True, kw_only=True)
class Recall:
    """The results of the evaluation.

    Attributes:
        clips: how many each of ``recordings`` had, ``asked`` at most.
        frames, skip: the length of a clip, and what is not counted of it.
        processed_own: by presentation, in how many clips ``memory of another`` has processed the clip's own recording;
            None where no model was evaluated under that condition.
        by_volume: of each model with blocks, volumes ascending; empty where none was asked for.
    """

    gains: list[Gains]
    by_position: list[ByPosition]
    recordings: list[str]
    left_out: list[str]
    asked: int
    clips: list[int]
    frames: int
    skip: int
    processed_own: dict[str, int] | None
    seed: int
    by_volume: list[AtVolume] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, model: str, condition: Condition, presentation: str) -> Gains:
        """The entry with these names. Raises KeyError."""
        for gains in self.gains:
            if (gains.model, gains.condition, gains.presentation) == (model, condition, presentation):
                return gains
        raise KeyError((model, condition, presentation))

    def gain(self, gains: Gains) -> Interval:
        """The mean over recordings."""
        return bootstrap(gains.values, mean_of_rows, seed=self.seed)

    def beyond_base(self, gains: Gains) -> Interval:
        """The mean beyond the base model's own gain."""
        base = self.of("base", "updates on", gains.presentation)
        return bootstrap(gains.values - base.values, mean_of_rows, seed=self.seed)

    def saved(self, gains: Gains) -> Interval:
        """How much lower the later loss is than the base model's: a gain can also come from a worse first loss."""
        base = self.of("base", "updates on", gains.presentation)
        return bootstrap(base.losses - gains.losses, mean_of_rows, seed=self.seed)


@renamed_arguments(subjects="models", pieces="clips")
def evaluate(
    models: Sequence[ModelUnderTest],
    documents: Sequence[Document],
    *,
    frames: int,
    conditions: Sequence[Condition],
    batch_size: int,
    clips: int = 1,
    volumes: Sequence[float] = (),
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Recall:
    """Present A, A, B, A to every model, for each clip A; B is a clip of another recording.

    Each recording gives up to ``clips`` clips of ``frames`` frames, one after the other from its beginning. The frames
    that are not counted are the attention context at the beginning of each presentation. ``memory reset`` and
    ``memory of another`` act between presentations. At the ``volumes``, models with blocks are evaluated with updates
    on, and the base model, which is the first of ``models`` then, once.

    Raises ConfigError when fewer than two recordings have a clip, or the context leaves nothing to count; and as
    ``refuse_volumes`` and ``require_base``.
    """
    skip = int(models[0].model.context or 0)
    kept, left_out = choose(documents, frames, clips, skip)
    refuse_volumes(models, volumes)
    require_base(models, volumes, conditions)
    counts = [min(clips, document.frames // frames) for document in kept]
    batches = lay_out(counts, batch_size, next_between=clips == 1)  # so one clip of each gives the numbers it gave
    presented = _Presentations(kept, batches, frames, skip, on_batch)
    gains, by_position, by_volume, exchanged = [], [], [], False
    base: Tensor | None = None
    for tested in models:
        with tested.present():  # once for all its conditions
            losses_of = {
                condition: presented.losses(tested, condition)
                for condition in conditions
                if condition in tested.conditions
            }
            for condition, losses in losses_of.items():
                exchanged = exchanged or condition == "memory of another"
                gains += [presented.gains(losses, tested.name, condition, presentation) for presentation in LATER]
                by_position.append(presented.by_position(losses, tested, condition))
            if tested.name == "base":
                base = losses_of.get("updates on")
            for volume in volumes if tested.injection is not None else ():
                assert base is not None  # require_base
                losses = losses_of["updates on"] if volume == 1 else presented.losses(tested, "updates on", volume)
                by_volume.append(presented.at_volume(losses, base, tested, volume))
    return Recall(
        gains=gains, by_position=by_position, recordings=[document.name for document in kept], left_out=left_out,
        asked=clips, clips=counts, frames=frames, skip=skip, seed=seed, by_volume=by_volume,
        processed_own=processed_own(batches) if exchanged else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Presentations:
    """What every model is presented, and what is counted of it."""

    documents: Sequence[Document]
    batches: Sequence[Sequence[Row]]
    frames: int
    skip: int
    on_batch: Callable[[], None]

    def losses(self, tested: ModelUnderTest, condition: Condition, volume: float = 1.0) -> Tensor:
        """``[P, 4, T]``: of A, A, B, A."""
        parts = []
        for rows in self.batches:
            codes = _presented_codes(self.documents, rows, self.frames)
            parts.append(evaluate_codes(tested, codes, condition, every=self.frames, volume=volume).audio)
            self.on_batch()
        losses: Tensor = torch.cat(parts).unflatten(1, (4, self.frames))
        return losses

    def of_recordings(self, values: Tensor) -> Tensor:
        """``[R, ...]``: the mean of each recording's clips, of ``values [P, ...]``."""
        owners = torch.tensor([row.own.recording for rows in self.batches for row in rows])
        return torch.stack([values[owners == recording].nanmean(0) for recording in range(len(self.documents))])

    def counted(self, losses: Tensor) -> Tensor:
        """``[R]``: the mean loss of a presentation, ``losses [P, T]``."""
        return self.of_recordings(losses[:, self.skip :].nanmean(1))

    def gains(self, losses: Tensor, model: str, condition: Condition, presentation: str) -> Gains:
        """Of ``losses [P, 4, T]``."""
        later = losses[:, PLACES[presentation]]
        return Gains(
            model=model, condition=condition, presentation=presentation, values=self.counted(losses[:, 0] - later),
            losses=self.counted(later),
        )  # fmt: skip

    def by_position(self, losses: Tensor, tested: ModelUnderTest, condition: Condition) -> ByPosition:
        """Of ``losses [P, 4, T]``."""
        means = self.of_recordings(losses).nanmean(0)  # [4, T]
        mean = _without_late(tested.model, means[list(PLACES.values())])  # [3, T]
        return ByPosition(model=tested.name, condition=condition, losses=mean)

    def at_volume(self, losses: Tensor, base: Tensor, tested: ModelUnderTest, volume: float) -> AtVolume:
        """Of ``losses [P, 4, T]``, beside the base model's."""
        saved, apart = losses[:, 0] - losses[:, 1], (losses - base).abs()
        return AtVolume(
            model=tested.name,
            volume=volume,
            recall=self.counted(saved - (base[:, 0] - base[:, 1])),
            cost=self.counted(losses[:, 0] - base[:, 0]),
            saved=self.counted(base[:, 1] - losses[:, 1]),
            apart=float(torch.where(losses.isnan() & base.isnan(), 0, apart.nan_to_num(torch.inf)).max()),
            output_scales=own_scales(tested),
        )


def choose(documents: Sequence[Document], frames: int, clips: int, skip: int) -> tuple[list[Document], list[str]]:
    """The recordings that have a clip, and a word on each that has none."""
    if clips < 1:
        raise ConfigError(f"{clips} clips of each recording: give 1 or more.")
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


def _presented_codes(documents: Sequence[Document], rows: Sequence[Row], frames: int) -> Tensor:
    """``[B, Q, 4 T]``: A, A, B, A of each row."""

    def codes(clip: Clip) -> Tensor:
        start = clip.number * frames
        return documents[clip.recording].codes[:, start : start + frames]

    return torch.stack(
        [torch.cat([codes(row.own), codes(row.own), codes(row.between), codes(row.own)], dim=1) for row in rows]
    )


def _without_late(model: Any, losses: Tensor) -> Tensor:
    """``losses [3, T]`` with NaN at the end of the third presentation, where the means lack the late codebooks."""
    late = max(model.delays[model.audio_offset : model.audio_offset + model.dep_q])
    losses[-1, losses.shape[1] - late :] = torch.nan
    return losses
