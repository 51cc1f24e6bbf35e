"""A short causal convolution over time, a filter for each channel, for calls and streams.

    y_t = sum over j of taps[j] * z_(t - j),    j = 0 .. K - 1

What was before the first token is zero. A stream keeps the last K - 1 tokens: a cache to compute with, not memory.

Shape legend: B streams, T tokens, D channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def initial_cache(batch: int, channels: int, taps: int, like: Tensor) -> Tensor:
    """``[B, K - 1, D]`` of zeros, oldest token first, in the dtype and on the device of ``like``."""
    return like.new_zeros(1, taps - 1, channels).expand(batch, -1, -1)


def with_cache(z: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """``z [B, T, D]`` after the tokens of ``cache [B, K - 1, D]``, ``[B, K - 1 + T, D]``, and the cache after them."""
    padded = torch.cat([cache.to(z.dtype), z], dim=1)
    return padded, padded[:, z.shape[1] :].to(cache.dtype)


def convolve(padded: Tensor, taps: Tensor) -> Tensor:
    """``[B, T, D]`` from ``padded [B, K - 1 + T, D]``, as ``with_cache`` gives it, and ``taps [D, K]``, lag j at j."""
    kernel = taps.shape[1]
    if padded.shape[1] == kernel:  # one token: a product instead of a convolution
        return (padded * taps.flip(1).mT).sum(1, keepdim=True)
    # [B, K - 1 + T, D] -> [B, D, K - 1 + T]; a convolution in torch's sense has its oldest tap first
    return F.conv1d(padded.mT, taps.flip(1)[:, None], groups=taps.shape[0]).mT


def keep(cache: Tensor, after: Tensor, rows: Tensor | None) -> None:
    """Write the cache after a step into ``cache``, in place, in rows where ``rows [B]`` is true (None: in all)."""
    cache.copy_(after if rows is None else torch.where(rows[:, None, None], after, cache))
