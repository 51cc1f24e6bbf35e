"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over interleaved pairs.

On a grid over time each axis has channels of its own, in the shares of CogVideoX (Yang et al. 2024, arXiv:2408.06072):
a quarter for time, three eighths each for row and column.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = {1: (8,), 3: (2, 3, 3)}
"""Number of axes -> eighths of the head width that each axis rotates."""


def widths(head_dim: int, axes: int) -> list[int]:
    """Channels that each axis rotates. Raises ValueError where they are not even whole numbers."""
    if axes not in SHARES or any(head_dim * share % 16 for share in SHARES[axes]):
        raise ValueError(
            f"RoPE over {axes} axes needs a head width that divides into {SHARES.get(axes)} eighths of pairs."
        )
    return [head_dim * share // 8 for share in SHARES[axes]]


def rotate(x: Tensor, position: Tensor, *, theta: float = 10_000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dimension by ``position * theta^(-2i / width)``.

    Args:
        x: ``[B, T, H, Dh]``, Dh even, any floating dtype.
        position: ``[B or 1, T]`` integer positions, or ``[B or 1, T, A]`` for A axes: each rotates channels of its
            own (``widths``), with frequencies of its own.
        theta: base of the frequencies.
        dtype: of angles and products; the result has the dtype of ``x``.
    """
    if position.dim() == 3:
        parts = x.split(widths(x.shape[-1], position.shape[-1]), dim=-1)  # A times [B, T, H, width of the axis]
        rotated = [
            rotate(part, where, theta=theta, dtype=dtype)
            # position [B or 1, T, A] -> A times [B or 1, T]
            for part, where in zip(parts, position.unbind(-1), strict=True)
        ]
        return torch.cat(rotated, dim=-1)  # [B, T, H, Dh]
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype)
    # [B or 1, T, 1, 1] and [Dh / 2] -> [B or 1, T, 1, Dh / 2]
    angle = position.to(dtype)[..., None, None] * theta ** (-pairs / x.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, Dh / 2, 2] -> twice [B, T, H, Dh / 2]
    # [B, T, H, Dh / 2, 2] -> [B, T, H, Dh]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
