"""Windows, slopes and intervals, against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch

from moshi_ttt.evaluation.statistics import (
    Interval,
    bootstrap,
    mean_of_recordings,
    slope_per_window,
    window_means,
)

NAN = math.nan


def test_window_means_leave_nan_out_and_drop_a_short_last_window():
    values = torch.tensor(
        [[1.0, 3.0, NAN, 5.0, NAN, NAN, 2.0], [1.0, 1.0, 1.0, 1.0, 2.0, NAN, NAN]], dtype=torch.float64
    )
    means = window_means(values, 2)
    assert means.shape == (2, 4)  # a window that is half full stays
    torch.testing.assert_close(means[0], torch.tensor([2.0, 5.0, NAN, 2.0], dtype=torch.float64), equal_nan=True)
    assert window_means(values, 3).shape == (2, 2)  # one that is a third full does not


@pytest.mark.parametrize("frames", [4, 5, 6, 7])
def test_window_means_of_whole_windows_are_means(frames):
    values = torch.randn(3, frames, dtype=torch.float64)
    means = window_means(values, 4)
    torch.testing.assert_close(means[:, 0], values[:, :4].mean(1))


def test_slope_is_that_of_a_line_whatever_is_missing():
    line = 3.0 + 0.5 * torch.arange(10, dtype=torch.float64)
    values = torch.stack([line, line + 1, line - 1])[None]
    values[0, :, 4] = NAN
    torch.testing.assert_close(slope_per_window(values), torch.tensor([0.5], dtype=torch.float64))


def test_an_interval_holds_the_mean_and_narrows_with_recordings():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (8, 800))
    narrow, wide = bootstrap(many, mean_of_recordings), bootstrap(few, mean_of_recordings)
    for interval, values in ((narrow, many), (wide, few)):
        assert interval.value == pytest.approx(float(values.mean()))
        assert interval.low < interval.value < interval.high
    assert narrow.high - narrow.low < 0.3 * (wide.high - wide.low)
    # 1.96 standard errors on either side, for so many rows
    error = float(many.mean(1).std()) / math.sqrt(800)
    assert narrow.high - narrow.value == pytest.approx(1.96 * error, rel=0.15)


def test_intervals_are_the_same_for_the_same_seed_and_not_for_another():
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random = torch.get_rng_state()
    assert bootstrap(values, mean_of_recordings, seed=1) == bootstrap(values, mean_of_recordings, seed=1)
    assert bootstrap(values, mean_of_recordings, seed=1) != bootstrap(values, mean_of_recordings, seed=2)
    assert torch.equal(torch.get_rng_state(), random)


def test_one_recording_has_no_interval():
    interval = bootstrap(torch.ones(1, 4), mean_of_recordings)
    assert interval.value == 1.0
    assert math.isnan(interval.low)
    assert not interval.clear_of_zero


@pytest.mark.parametrize(("low", "high", "clear"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)])
def test_clear_of_zero(low, high, clear):
    assert Interval((low + high) / 2, low, high).clear_of_zero is clear
