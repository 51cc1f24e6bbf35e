"""Vectors over their norm or root mean square, safe at zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def l2_normalize(x: Tensor, exact: bool = False) -> Tensor:
    """``x / max(|x|, 1e-12)`` over the last dimension (the smallest normal number where a dtype has no 1e-12).

    A zero vector stays zero, with gradient 1: the formula's own, 1e12, would swamp every other token's.

    Args:
        x: ``[..., d]``.
        exact: gives a zero vector a second derivative too, zero, where the norm's is nan.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
    positive = norm > 0
    if exact:
        norm = torch.linalg.vector_norm(torch.where(positive, x, 1), dim=-1, keepdim=True)
    return x / torch.where(positive, norm.clamp(min=max(1e-12, torch.finfo(x.dtype).tiny)), 1)


def rms_normalize(x: Tensor, exact: bool = False) -> Tensor:
    """``x / rms(x)`` over the last dimension of ``x [..., d]``; a zero vector stays zero. ``exact``: see above."""
    return l2_normalize(x, exact) * math.sqrt(x.shape[-1])
