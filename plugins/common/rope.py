"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over interleaved pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, *, theta: float = 10_000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension by ``position * theta^(-2i / Dh)``.

    Args:
        x: ``[B, T, H, Dh]``, Dh even, any floating dtype.
        position: ``[B or 1, T]`` integer positions.
        theta: base of the frequencies.
        dtype: what angles and products are computed in; the result has the dtype of ``x``.
    """
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype)
    angle = position.to(dtype)[..., None, None] * theta ** (-pairs / x.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
