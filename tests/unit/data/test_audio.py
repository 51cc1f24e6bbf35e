"""Resampling: in time, whole, and of the right length."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.data.audio import resample


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 25_440, 44_100, 48_000])
@pytest.mark.parametrize("count", [100, 1_024, 30_011])
def test_what_is_resampled_is_in_time_and_whole(rate, count):
    def swell(at: int, length: int) -> torch.Tensor:
        """A tone of 150 Hz that comes and goes, over ``count`` samples at ``rate``, sampled at another rate."""
        time = torch.arange(length) / at
        return torch.sin(2 * torch.pi * 150 * time) * torch.sin(torch.pi * time * rate / count).clamp(min=0)

    made = resample(swell(rate, count), rate, 24_000)
    assert made.shape == (round(count * 24_000 / rate),)
    assert made.dtype == torch.float32
    assert (made - swell(24_000, made.numel())).abs().max() < 0.02


def test_at_the_same_rate_nothing_is_done():
    samples = torch.randn(7)
    assert resample(samples, 24_000, 24_000) is samples
