"""A short causal convolution over time, a filter of its own for each channel, and its cache.

    out_t = sum over j < K of taps[:, j] * z_(t-j)

With one at lag 1 a key is that of the token before, and the value stored with it is what followed that token.

The cache is the last K - 1 tokens, oldest first, and zero at a stream's start. It is state and not memory: it holds
the input, whether or not test-time updates are enabled, so a block leaves it out of ``memory_names``. Products are
added tap by tap, lag 0 first, whatever the number of tokens: any cut of a sequence gives the same bits.

A token that is not finite, or too large (``finite.largest_factor``), counts as zero, in the call and in the cache:
later tokens are what they would be had it been zero.

Shape legend: B streams, T tokens, D channels, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moshi_ttt.core.state import row_mask
from moshi_ttt.plugins.common.finite import below, largest_factor


def one_at_lag(channels: int, kernel: int, lag: int) -> Tensor:
    """Taps ``[D, K]`` float32 that give the token ``lag`` tokens before. Raises ValueError where no tap reaches it."""
    if not 0 <= lag < kernel:
        raise ValueError(f"{kernel} taps reach lags 0 to {kernel - 1}, not {lag}. Give {lag + 1} taps or more.")
    taps = torch.zeros(channels, kernel)
    taps[:, lag] = 1
    return taps


def empty_cache(batch: int, channels: int, kernel: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """``[B, K - 1, D]`` of zeros: the cache at a stream's start."""
    return torch.zeros(batch, kernel - 1, channels, device=device, dtype=dtype)


def convolve(z: Tensor, taps: Tensor, cache: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The convolution of a whole call; writes into none of its arguments.

    Args:
        z: ``[B, T, D]``.
        taps: ``[D, K]``, lag 0 first; computed with in the dtype of ``z``.
        cache: ``[B, K - 1, D]``, from the call before, or ``empty_cache``.
        kept: ``[B, T]`` bool; a token where it is false counts as zero, as one that is not finite does.

    Returns:
        ``[B, T, D]`` in the dtype of ``z``, and the cache after the last token, in the dtype of ``cache``.
    """
    window = torch.cat([cache.to(z.dtype), _only_finite(z, kept)], dim=1)  # [B, K - 1 + T, D]
    after = window[:, window.shape[1] - cache.shape[1] :].to(cache.dtype)
    return _filtered(window, taps, z.shape[1]), after


@torch.no_grad()
def convolve_step(
    z: Tensor, taps: Tensor, cache: Tensor, exec_mask: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """The convolution of one token ``z [B, 1, D]``; ``cache`` is updated in place, without a device synchronization.

    Rows where ``exec_mask [B]`` is false keep their cache bit for bit. Otherwise as ``convolve``, bit for bit.
    """
    window = torch.cat([cache.to(z.dtype), _only_finite(z, kept)], dim=1)  # [B, K, D]
    following = window[:, 1:].to(cache.dtype)
    if exec_mask is not None:
        following = torch.where(row_mask(exec_mask, cache), following, cache)
    cache.copy_(following)
    return _filtered(window, taps, 1)


class Convolutions:
    """The convolutions of one call, of queries and keys, each with taps and a cache of its own.

    Args:
        taps: of each, ``[D, K]``.
        caches: of each, ``[B, K - 1, D]``. A call puts the caches after it in the list, or, ``in_place``, writes to
            them, in rows where ``exec_mask [B]`` is true or None; it then takes one token.
        finite: ``[B, T]`` bool; other tokens count as zero.
    """

    def __init__(
        self,
        taps: Sequence[Tensor],
        caches: list[Tensor],
        finite: Tensor,
        *,
        in_place: bool = False,
        exec_mask: Tensor | None = None,
    ) -> None:
        self.taps, self.caches, self.finite = taps, caches, finite
        self.in_place, self.exec_mask = in_place, exec_mask

    def __call__(self, q: Tensor, k: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected queries and keys ``[B, T, D]`` after their convolutions; others than ``kept`` count as zero too."""
        kept = self.finite if kept is None else self.finite & kept
        found = [self._convolved(index, z, kept) for index, z in enumerate((q, k))]
        return found[0], found[1]

    def _convolved(self, index: int, z: Tensor, kept: Tensor) -> Tensor:
        if self.in_place:
            return convolve_step(z, self.taps[index], self.caches[index], self.exec_mask, kept)
        out, self.caches[index] = convolve(z, self.taps[index], self.caches[index], kept)
        return out


def _only_finite(z: Tensor, kept: Tensor | None) -> Tensor:
    """``z [B, T, D]`` with zeros for tokens that are not finite, too large, or not ``kept [B, T]``."""
    with torch.no_grad():
        finite = below(z, largest_factor(z.dtype))  # [B, T]
        finite = finite if kept is None else finite & kept
    return torch.where(finite[..., None], z, 0)  # [B, T, 1] over [B, T, D]


def _filtered(window: Tensor, taps: Tensor, length: int) -> Tensor:
    """The last ``length`` outputs, of ``window [B, K - 1 + length, D]``."""
    taps = taps.to(window.dtype)
    newest = taps.shape[1] - 1
    total = window[:, newest:] * taps[:, 0]
    for lag in range(1, taps.shape[1]):
        total = total + window[:, newest - lag : newest - lag + length] * taps[:, lag]
    return total
