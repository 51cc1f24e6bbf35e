"""Loss by position on held-out speech, and the difference between two models on the same speech."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.host import HostModel

WINDOW = 64
"""Frames (5.1 s) that one window mean covers."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Audio loss by frame, ``values [T]`` in nats per token, NaN where nothing is predicted."""

    name: str
    values: Tensor

    @property
    def mean(self) -> float:
        return float(self.values.nanmean())

    def windows(self, size: int = WINDOW) -> list[tuple[int, int, float]]:
        """(first frame, last frame, mean) of each window; a last one less than half full joins the one before."""
        parts = _windows(self.values, size)
        return [(start, start + len(part) - 1, float(part.nanmean())) for start, part in parts]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much lower the loss of one curve is than another's, frame by frame on the same speech.

    Attributes:
        mean: nats per token; positive means that ``better`` is better.
        error: standard error of the mean, taken over windows, because neighbouring frames are not independent.
    """

    better: str
    worse: str
    mean: float
    error: float
    second_half: float

    @property
    def clear(self) -> bool:
        """Whether the mean is more than two standard errors away from zero."""
        return abs(self.mean) > 2 * self.error


def evaluate(model: Any, host: HostModel, codes: Tensor, *, name: str, updates: bool = True) -> Curve:
    """The curve of ``model`` over one document, ``codes [Q, T]``, from the learned initial state on."""
    with host.updates(model, updates), host.carry(model):
        return Curve(name=name, values=host.losses().by_position(model, codes[None])["audio"][0])


def compare(better: Curve, worse: Curve) -> Difference:
    """Subtract the curves: ``worse - better``. Both must be of the same document."""
    difference = worse.values - better.values
    means = torch.tensor([float(part.nanmean()) for _, part in _windows(difference, WINDOW)])
    return Difference(
        better=better.name,
        worse=worse.name,
        mean=float(difference.nanmean()),
        error=float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan,
        second_half=float(difference[len(difference) // 2 :].nanmean()),
    )


def _windows(values: Tensor, size: int) -> list[tuple[int, Tensor]]:
    starts = list(range(0, len(values), size))
    if len(starts) > 1 and len(values) - starts[-1] < size / 2:
        starts.pop()
    ends = [*starts[1:], len(values)]
    return [(start, values[start:end]) for start, end in zip(starts, ends, strict=True)]
