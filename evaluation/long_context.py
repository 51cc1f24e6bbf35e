"""Loss by position over long recordings: does memory help beyond the attention context, and does it keep helping?

Every model processes every recording from its beginning: token by token, or in segments as in training, where
attention restarts in each. Positions are counted from the recording's beginning; what is reported are means over
windows of positions, and figures over the windows beyond what attention sees.

Shape legend: R recordings, T frames, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.deprecation import renamed_arguments, renamed_attributes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.documents import Document, batches
from moshi_ttt.evaluation.models import Condition, ModelUnderTest, evaluate_codes, refuse_uneven
from moshi_ttt.evaluation.statistics import (
    Interval,
    bootstrap,
    mean_of_recordings,
    slope_per_window,
    window_means,
)
from moshi_ttt.evaluation.teacher_forcing import FrameLosses

STREAMS = ("audio", "text")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How recordings are processed.

    Attributes:
        window: frames of a window.
        every: frames between two interventions of the conditions that intervene.
        batch_size: recordings in a batch.
        conditions: which are run.
        segments: frames of the forward passes of a recording; None streams it token by token.
        spans: frames at which recordings are divided into spans of positions, ascending; empty reports none.
        seed: of the bootstrap.
    """

    window: int
    every: int
    batch_size: int
    conditions: tuple[Condition, ...]
    segments: int | None = None
    spans: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Span:
    """What is saved at positions of a recording: ``first <= frame < end``, without an end where it is None.

    Attributes:
        recordings: how many reach it.
        saved: against the base model.
    """

    first: int
    end: int | None
    recordings: int
    saved: Interval

    @property
    def label(self) -> str:
        return f"{self.first} and more" if self.end is None else f"{self.first} to {self.end - 1}"


def read_spans(text: str, window: int) -> tuple[int, ...]:
    """``"48,192,480"`` as numbers of frames.

    Raises ConfigError where they are not ascending, or no multiples of ``window``.
    """
    try:
        spans = tuple(int(part) for part in text.split(","))
    except ValueError:
        spans = ()
    if not spans or spans[0] < 0 or any(a >= b for a, b in pairwise(spans)):
        raise ConfigError(f"--spans {text!r}: give ascending numbers of frames, such as 48,192,480,960.")
    if uneven := [span for span in spans if span % window]:
        raise ConfigError(
            f"--spans {text!r}: {uneven[0]} is inside a window of {window} frames. Give multiples of {window}, or "
            "another --window."
        )
    return spans


@renamed_attributes(subject="model")
@dataclass(frozen=True, kw_only=True)
class PositionCurve:
    """One model under one condition, on one stream of tokens.

    Attributes:
        windows: ``[R, W]`` nats per token, NaN where a recording has no such window.
        first_beyond: the first window that begins beyond what attention sees.
    """

    model: str
    condition: Condition
    stream: str
    windows: Tensor
    first_beyond: int

    @property
    def label(self) -> str:
        return self.model if self.model == "base" else f"{self.model}, {self.condition}"

    @property
    def beyond(self) -> Tensor:
        """``[R, W']``: the windows beyond what attention sees."""
        return self.windows[:, self.first_beyond :]


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """The results of the evaluation.

    Attributes:
        curves: one for each model, condition and stream.
        recordings: their names, in the order of R.
        left_out: recordings that do not reach beyond what attention sees.
        context: frames of the model's attention.
        reach: how many of them it can see: no more than a segment has.
    """

    curves: list[PositionCurve]
    recordings: list[str]
    left_out: list[str]
    context: int
    reach: int
    options: Options
    facts: dict[str, Any] = field(default_factory=dict)

    def curve(self, model: str, condition: Condition, stream: str) -> PositionCurve:
        """The entry with these names. Raises KeyError."""
        for curve in self.curves:
            if (curve.model, curve.condition, curve.stream) == (model, condition, stream):
                return curve
        raise KeyError((model, condition, stream))

    def loss(self, curve: PositionCurve) -> Interval:
        """Mean loss beyond what attention sees."""
        return bootstrap(curve.beyond, mean_of_recordings, seed=self.options.seed)

    def slope(self, curve: PositionCurve) -> Interval:
        """Nats per 1,000 frames by which the loss rises beyond what attention sees."""
        scale = 1_000 / self.options.window
        return bootstrap(curve.beyond, lambda values: scale * slope_per_window(values), seed=self.options.seed)

    def saved(self, curve: PositionCurve, other: PositionCurve) -> Interval:
        """How much lower the loss of ``curve`` is than ``other``'s, by recording, beyond what attention sees."""
        return bootstrap(other.beyond - curve.beyond, mean_of_recordings, seed=self.options.seed)

    def saved_by_span(self, curve: PositionCurve, other: PositionCurve) -> list[Span]:
        """What is saved against ``other`` at the positions of each span, from what attention does not see on.

        A span that no recording reaches is left out.
        """
        difference = other.windows - curve.windows  # [R, W]
        spans = []
        for first, end in zip(self.options.spans, (*self.options.spans, None)[1:], strict=True):
            begin = max(first // self.options.window, curve.first_beyond)
            values = difference[:, begin : None if end is None else end // self.options.window]
            if count := int((~values.isnan()).any(1).sum()):
                saved = bootstrap(values, mean_of_recordings, seed=self.options.seed)
                spans.append(Span(first=first, end=end, recordings=count, saved=saved))
        return spans


@renamed_arguments(subjects="models")
def evaluate(
    models: Sequence[ModelUnderTest],
    documents: Sequence[Document],
    options: Options,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> LongContext:
    """Evaluate every model on every document under every condition that applies to it.

    Raises ConfigError when no recording reaches a window beyond what attention sees, or a condition that is run would
    act inside a segment.
    """
    segments = options.segments
    if segments is not None and segments < 1:
        raise ConfigError(f"Segments of {segments} frames: give 1 or more, or none to stream.")
    run = {condition for tested in models for condition in options.conditions if condition in tested.conditions}
    refuse_uneven([each for each in options.conditions if each in run], every=options.every, segments=segments)
    context = models[0].context
    reach = context if segments is None else min(context or segments, segments)
    first_beyond = -(-reach // options.window)
    kept, left_out = _choose(documents, (first_beyond + 1) * options.window, context, options)
    curves: list[PositionCurve] = []
    names: list[str] = []
    padding = models[0].padding
    for tested in models:
        with tested.present():  # once for all its conditions
            for condition in (each for each in options.conditions if each in tested.conditions):
                found: list[FrameLosses] = []
                names = []
                for chosen, codes in batches(kept, options.batch_size, padding):
                    found.append(evaluate_codes(tested, codes, condition, every=options.every, segments=segments))
                    names += [document.name for document in chosen]
                    on_batch()
                curves += _curves(tested, condition, found, options.window, first_beyond)
    if all(curve.windows.isnan().all() for curve in curves):
        raise ConfigError(
            "Nothing in these recordings is predicted. A model of text alone needs recordings with transcripts: give a "
            "manifest of them as --data."
        )
    return LongContext(
        curves=curves, recordings=names, left_out=left_out, context=context, reach=reach, options=options
    )  # fmt: skip


def _curves(
    tested: ModelUnderTest, condition: Condition, found: Sequence[FrameLosses], window: int, first_beyond: int
) -> list[PositionCurve]:
    """A curve for each stream of tokens, of the losses of all batches."""
    return [
        PositionCurve(
            model=tested.name, condition=condition, stream=stream, first_beyond=first_beyond,
            windows=window_means(_stack([getattr(losses, stream) for losses in found]), window),
        )
        for stream in STREAMS
    ]  # fmt: skip


def _choose(
    documents: Sequence[Document], needed: int, context: int, options: Options
) -> tuple[list[Document], list[str]]:
    """The recordings of ``needed`` frames or more, and a word on each that is shorter."""
    kept = [document for document in documents if document.frames >= needed]
    left_out = [f"{document.name} ({document.frames} frames)" for document in documents if document.frames < needed]
    if not kept:
        longest = max((document.frames for document in documents), default=0)
        segments = f", segments of {options.segments}" if options.segments is not None else ""
        raise ConfigError(
            f"No recording reaches beyond the attention's context: {needed} frames are needed (context {context}"
            f"{segments}, one window of {options.window}), the longest has {longest}. Give longer recordings, or a "
            "smaller --window."
        )
    return kept, left_out


def _stack(losses: Sequence[Tensor]) -> Tensor:
    """``[R, T]`` of parts ``[B, T']``, NaN beyond their ends."""
    longest = max(part.shape[1] for part in losses)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=torch.nan) for part in losses])
