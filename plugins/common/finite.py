"""Which tokens may update a memory: those that are finite, and small enough that sums of their products stay finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moshi_ttt.core.block import SiteInfo
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles


def largest_factor(dtype: torch.dtype) -> float:
    """The bound of keys, targets and rates: the fourth root of the largest number (4e9 in float32).

    A product of three, summed over any stream and multiplied by a filter of usual size, is then finite.
    """
    largest: float = torch.finfo(dtype).max
    return math.sqrt(math.sqrt(largest))


def check_state_dtype(info: SiteInfo, roles: DtypeRoles) -> None:
    """Raise ConfigError for a state in float16: its fourth root, 16, would leave out ordinary tokens."""
    if roles.state == torch.float16:
        raise ConfigError(
            f"{info.site}: policy {roles.policy!r} keeps the state in float16, whose numbers end at 65504: sums of "
            "updates need more. Use a policy whose state is float32."
        )


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


def or_zero(x: Tensor) -> Tensor:
    """``x [B, T, any]`` with zeros for tokens that are not finite: nothing of them enters a gradient of a parameter."""
    with torch.no_grad():
        finite = below(x, float("inf"))[..., None]  # [B, T] -> [B, T, 1]
    return torch.where(finite, x, 0)
