"""Means, slopes and their bootstrap intervals. What is resampled is recordings, for frames of one are not independent.

Shape legend: R recordings, T frames, W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.system.report.tables import show_interval
from moshi_ttt.system.report.writer import number

RESAMPLES = 2_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and its percentile bootstrap interval; the bounds are NaN for a single recording."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.show(sign=True)

    def show(self, digits: int = 4, *, sign: bool = False, scale: float = 1.0) -> str:
        """As ``tables.show_interval``: ``value (low to high)``, or the value alone for a single recording."""
        return show_interval(self.value, self.low, self.high, digits, sign=sign, scale=scale)

    @property
    def clear_of_zero(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def as_json(interval: Interval) -> dict[str, float | None]:
    """Its three numbers; None for what is not finite, which JSON cannot hold."""
    return {name: number(value) for name, value in vars(interval).items()}


def window_means(values: Tensor, size: int) -> Tensor:
    """``[R, W]``: means over windows of ``size`` frames of ``values [R, T]``, NaN left out; NaN where nothing is left.

    A last window that is less than half full is dropped.
    """
    frames = values.shape[1]
    count = frames // size + (frames % size * 2 >= size)
    padded = torch.nn.functional.pad(values[:, : count * size], (0, max(0, count * size - frames)), value=torch.nan)
    means: Tensor = padded.unflatten(1, (count, size)).nanmean(2)
    return means


def bootstrap(values: Tensor, figure: Callable[[Tensor], Tensor], *, seed: int = 0) -> Interval:
    """``figure`` of ``values [R, ...]`` and of resamples of its rows: ``[S, R, ...]`` to ``[S]``, NaN-aware itself."""
    rows = values.shape[0]
    own = float(figure(values[None])[0])
    if rows < 2:
        return Interval(own, torch.nan, torch.nan)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(rows, (RESAMPLES, rows), generator=generator)
    spread = figure(values[drawn])
    spread = spread[spread.isfinite()]
    if not spread.numel():
        return Interval(own, torch.nan, torch.nan)
    low, high = torch.quantile(spread, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=spread.dtype)).tolist()
    return Interval(own, low, high)


def mean_of_recordings(values: Tensor) -> Tensor:
    """``[S]``: the mean over recordings of each recording's mean, of ``[S, R, W]``, NaN left out."""
    return values.nanmean(2).nanmean(1)


def mean_of_rows(values: Tensor) -> Tensor:
    """``[S]``: the mean over recordings or items, of ``[S, R]``."""
    return values.mean(1)


def slope_per_window(values: Tensor) -> Tensor:
    """``[S]``: the least-squares slope over windows of the mean over recordings, of ``[S, R, W]``."""
    mean = values.nanmean(1)
    position = torch.arange(mean.shape[1], dtype=mean.dtype).expand_as(mean)
    there = ~mean.isnan()
    count = there.sum(1, keepdim=True)
    x = torch.where(there, position - (position * there).sum(1, keepdim=True) / count, 0)
    y = torch.where(there, mean - mean.nansum(1, keepdim=True) / count, 0)
    return (x * y).sum(1) / x.square().sum(1)
