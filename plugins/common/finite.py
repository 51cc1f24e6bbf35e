"""Which tokens may update a memory: those that are finite, and small enough that sums of their products stay finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_factor(dtype: torch.dtype) -> float:
    """What keys, targets and rates must stay below: the fourth root of the largest number (4e9 in float32).

    A product of three, summed over any stream and multiplied by a filter of sane size, is then finite. In float16 it is
    the square root (256): the fourth, 16, would leave out sane tokens, so there a sum can still overflow.
    """
    largest: float = torch.finfo(dtype).max
    root = math.sqrt(largest)
    return root if dtype == torch.float16 else math.sqrt(root)


def finite_tokens(*factors: Tensor) -> Tensor:
    """``[B, T]`` bool: tokens whose every factor ``[B, T, any]`` is below ``largest_factor``; a nan is not."""
    with torch.no_grad():
        finite = below(factors[0], largest_factor(factors[0].dtype))
        for factor in factors[1:]:
            finite = finite & below(factor, largest_factor(factor.dtype))
        return finite


def below(factor: Tensor, limit: float) -> Tensor:
    """``[...]`` bool: where all of the last dimension of ``factor [..., any]`` is between ``-limit`` and ``limit``."""
    if factor.shape[-2] == 1:  # a streamed token: two operations instead of four
        return factor.abs().amax(-1) < limit
    # Apart, and without abs(): torch.aminmax along a dimension is five times slower on a CPU, and abs makes a copy.
    return torch.maximum(factor.amax(-1), -factor.amin(-1)) < limit
