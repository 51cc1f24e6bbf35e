"""How long a memory lasts: a clip, then N other clips, then the clip again, for each N asked for.

Every clip is one plain forward pass, its memory carried to the next pass; attention starts afresh in each, so it never
sees the first presentation. The N other clips are those of the smaller N and more: after each N the clip is presented
from a copy of the state, and that presentation leaves nothing behind. One run of max(N) clips answers every N.

Shape legend: R recordings, B clips under test, Q rows of the language model, T frames of a clip, I interludes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.deprecation import renamed_arguments, renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.evaluation.recall import choose
from moshi_ttt.evaluation.statistics import Interval, bootstrap
from moshi_ttt.evaluation.teacher_forcing import forward_losses
from moshi_ttt.evaluation.volumes import refuse_volumes
from moshi_ttt.hosts.moshi.host import MOSHI_HOST

FIGURES = ("gain", "saved", "once")


@renamed_attributes(pieces="clips")
@dataclass(frozen=True, kw_only=True)
class BetweenOptions:
    """What is presented.

    Attributes:
        counts: how many other clips lie between, ascending, each 1 or more.
        frames: of a clip.
        clips: clips under test of each recording, at most.
        batch_size: clips under test in one batch.
        volumes: of what the blocks add; none given is 1.
        seed: of the interludes' order and of the bootstrap.
    """

    counts: tuple[int, ...]
    frames: int
    batch_size: int
    clips: int = 1
    volumes: tuple[float, ...] = ()
    seed: int = 0


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class After:
    """One model at one volume after ``count`` other clips, in nats per audio token.

    Attributes:
        gain: ``[R]``, what the clip saves against its first presentation, beyond what it saves the base model.
        saved: ``[R]``, what this presentation itself costs less than the base model's.
        once: ``[R]``, what the interludes up to here, which are presented once, cost less than the base model's.
    """

    model: str
    volume: float
    count: int
    gain: Tensor
    saved: Tensor
    once: Tensor

    def interval(self, name: str, seed: int) -> Interval:
        """Of ``gain``, ``saved`` or ``once``: the mean over recordings."""
        return bootstrap(getattr(self, name), lambda values: values.mean(1), seed=seed)


@renamed_attributes(pieces="clips")
@dataclass(frozen=True, kw_only=True)
class Between:
    """The results of the evaluation.

    Attributes:
        after: by model, volume and count, in this order.
        clips: clips under test of each of ``recordings``.
        skip: the first frames of a presentation, which are not counted, as in recall.
        interludes: clips that there were to choose from.
    """

    after: list[After]
    recordings: list[str]
    left_out: list[str]
    clips: list[int]
    skip: int
    interludes: int
    options: BetweenOptions
    facts: dict[str, Any] = field(default_factory=dict)


def read_counts(texts: Sequence[str]) -> tuple[int, ...]:
    """The numbers of ``--between 1,6,47``, ascending. Raises ConfigError for anything else, or a number twice."""
    found: list[int] = []
    for item in ",".join(texts).split(","):
        text = item.strip()
        count = int(text) if text.isascii() and text.isdigit() else 0
        if count < 1:
            raise ConfigError(
                f"--between {','.join(texts)!r}: {text!r} is no number of clips. Give whole numbers from 1, between "
                "commas, as in 1,6,47."
            )
        if count in found:
            raise ConfigError(f"--between {','.join(texts)!r}: {count} is given twice. Give each number once.")
        found.append(count)
    return tuple(sorted(found))


def refuse_incomplete(counts: Sequence[int], interludes: str | None, adapters: bool) -> None:
    """Raise ConfigError where ``--between`` lacks what it needs, or ``--interludes`` is given without it."""
    if counts and interludes is None:
        raise ConfigError(
            "--between needs the recordings whose clips lie between: give --interludes, such as the manifest of "
            "training recordings."
        )
    if interludes is not None and not counts:
        raise ConfigError("--interludes without --between: say how many clips lie between, as in --between 1,6,47.")
    if counts and not adapters:
        raise ConfigError("--between compares adapters with the base model: give some, as in --adapter ttt=RUN.")


@renamed_arguments(subjects="models")
def evaluate(
    models: Sequence[ModelUnderTest],
    documents: Sequence[Document],
    interludes: Sequence[Document],
    options: BetweenOptions,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Between:
    """Present each clip, other clips, and the clip again after each of ``options.counts``, to every model.

    The base model is the first of ``models``. Models without blocks have no volume and are at 1.

    Raises ConfigError as recall does, when there is only the base model, and when interludes are too few or are
    recordings under test.
    """
    refuse_incomplete(options.counts, "", len(models) > 1)
    refuse_volumes(models, options.volumes)
    skip = int(models[0].model.context or 0)
    kept, left_out = choose(documents, options.frames, options.clips, skip)
    others = _interludes(interludes, documents, options)
    clips = [min(options.clips, document.frames // options.frames) for document in kept]
    presented = _Presented(kept, clips, others, options, skip, on_batch)
    base, after = presented.losses(models[0], 1.0), []
    for tested in models[1:]:
        for volume in (options.volumes if tested.injection is not None else ()) or (1.0,):
            losses = presented.losses(tested, volume)
            after += [presented.after(losses, base, tested.name, volume, place) for place in range(len(options.counts))]
    return Between(
        after=after, recordings=[document.name for document in kept], left_out=left_out, clips=clips, skip=skip,
        interludes=len(others), options=options,
    )  # fmt: skip


@dataclass(frozen=True)
class _Losses:
    """Mean losses over the counted frames: ``first [B]``, ``again [B, N]``, ``interludes [B, max(counts)]``."""

    first: Tensor
    again: Tensor
    interludes: Tensor


@dataclass(frozen=True)
class _Presented:
    """What every model is presented, and what is counted of it; ``others`` are the clips between."""

    documents: Sequence[Document]
    clips: Sequence[int]
    others: Sequence[Tensor]
    options: BetweenOptions
    skip: int
    on_batch: Callable[[], None]

    @property
    def owners(self) -> Tensor:
        """``[B]``: the recording of each clip under test."""
        return torch.arange(len(self.clips)).repeat_interleave(torch.tensor(self.clips))

    def losses(self, tested: ModelUnderTest, volume: float) -> _Losses:
        """Of all clips under test, ``options.batch_size`` in a batch."""
        rows = [
            document.codes[:, number * self.options.frames : (number + 1) * self.options.frames]
            for document, count in zip(self.documents, self.clips, strict=True)
            for number in range(count)
        ]
        parts = []
        with tested.present(), MOSHI_HOST.updates(tested.model, True), MOSHI_HOST.volume(tested.model, volume):
            for numbers in torch.arange(len(rows)).split(self.options.batch_size):
                parts.append(self._batch(tested.model, torch.stack([rows[n] for n in numbers]), numbers, len(rows)))
                self.on_batch()
        return _Losses(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))

    def _batch(self, model: Any, codes: Tensor, numbers: Tensor, total: int) -> _Losses:
        """Of ``codes [B, Q, T]``, the clips ``numbers [B]`` of ``total``."""
        first, state = self._forward(model, codes, None)
        again, between = [], []
        for place in range(max(self.options.counts)):
            # Each row begins at a place of its own in the interludes, and goes around.
            starts = numbers * len(self.others) // total
            clips = torch.stack([self.others[(start + place) % len(self.others)] for start in starts.tolist()])
            loss, state = self._forward(model, clips, state)  # clips [B, Q, T]
            between.append(loss)
            if place + 1 in self.options.counts:
                again.append(self._forward(model, codes, state)[0])  # the state after it is dropped
        return _Losses(first, torch.stack(again, dim=1), torch.stack(between, dim=1))

    def _forward(self, model: Any, codes: Tensor, state: CarriedState | None) -> tuple[Tensor, CarriedState]:
        """``[B]``: the mean audio loss of ``codes [B, Q, T]`` beyond ``skip``, and the state after them."""
        losses, after = forward_losses(model, codes, MOSHI_HOST, state)
        return losses.audio[:, self.skip :].nanmean(1), after

    def after(self, losses: _Losses, base: _Losses, model: str, volume: float, place: int) -> After:
        """The figures of the ``place``-th count, beside the base model's losses."""
        count = self.options.counts[place]
        gains = [each.first - each.again[:, place] for each in (losses, base)]
        return After(
            model=model,
            volume=volume,
            count=count,
            gain=self._of_recordings(gains[0] - gains[1]),
            saved=self._of_recordings(base.again[:, place] - losses.again[:, place]),
            once=self._of_recordings((base.interludes - losses.interludes)[:, :count].mean(1)),
        )

    def _of_recordings(self, values: Tensor) -> Tensor:
        """``[R]``: the mean over each recording's clips, of ``values [B]``."""
        return torch.stack([values[self.owners == recording].mean() for recording in range(len(self.documents))])


def _interludes(interludes: Sequence[Document], documents: Sequence[Document], options: BetweenOptions) -> list[Tensor]:
    """``I`` of ``[Q, T]``: all clips of the interludes, in random order. Raises ConfigError; see ``evaluate``."""
    known = {(document.name, document.frames) for document in documents}
    if shared := [each.name for each in interludes if (each.name, each.frames) in known or _same(each, documents)]:
        raise ConfigError(
            f"{len(shared)} of the interludes are recordings under test, the first {shared[0]}. Give --interludes "
            "other recordings than --data: what lies between must not be the clip itself."
        )
    frames, most = options.frames, max(options.counts)
    others = [
        document.codes[:, start : start + frames]
        for document in interludes
        for start in range(0, document.frames - frames + 1, frames)
    ]
    if len(others) < most:
        raise ConfigError(
            f"{most} other clips of {frames} frames are asked for, and --interludes has {len(others)}. Give more "
            "recordings, a smaller --frames, or smaller numbers to --between."
        )
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(options.seed))
    return [others[n] for n in order.tolist()]


def _same(interlude: Document, documents: Sequence[Document]) -> bool:
    """Whether a recording under test has the same audio tokens, whatever it is called."""
    audio = interlude.codes[1:]
    return any(document.frames == interlude.frames and torch.equal(document.codes[1:], audio) for document in documents)
