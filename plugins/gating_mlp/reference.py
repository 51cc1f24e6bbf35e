"""In-place TTT straight from its definition: one chunk after the other, the fast weight written out. Slow.

Shape legend: T tokens, d width, h hidden width, K taps. One stream at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filtered(target: Tensor, conv: Tensor, left: int) -> Tensor:
    """Depthwise filter over one chunk: ``target [c, d]`` and ``conv [d, K]``, zero beyond the chunk's edges.

    Tap k weighs the token at distance ``k - left``.
    """
    rows = []
    for c in range(target.shape[0]):
        total = torch.zeros_like(target[0])
        for k in range(conv.shape[1]):
            source = c + k - left
            if 0 <= source < target.shape[0]:
                total = total + conv[:, k] * target[source]
        rows.append(total)
    return torch.stack(rows)


def in_place(
    hidden: Tensor, target: Tensor, w_down: Tensor, conv: Tensor, projection: Tensor | None, lr: Tensor, *,
    chunk_size: int, left: int, decay: float = 0.0, clip: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Apply, then update, chunk by chunk.

    Args:
        hidden: ``[T, h]``, the gated hidden activation.
        target: ``[T, d]``.
        w_down: ``[d, h]``, the learned down projection W_0.
        conv: ``[d, K]``; projection: ``[d, d]`` or None for the identity.
        lr: ``[T]`` per token.

    Returns:
        ``y [T, d]`` and the accumulated update ``[d, h]`` after the last full chunk.
    """
    delta = torch.zeros_like(w_down)
    outputs = []
    for start in range(0, hidden.shape[0], chunk_size):
        keys, wanted = hidden[start : start + chunk_size], target[start : start + chunk_size]
        outputs.append(keys @ (w_down + delta).T)
        if keys.shape[0] == chunk_size:
            values = filtered(wanted, conv, left)
            if projection is not None:
                values = values @ projection
            update = torch.zeros_like(delta)
            for c in range(chunk_size):
                update = update + lr[start + c] * torch.outer(values[c], keys[c])
            if clip is not None:
                update = update * torch.clamp(clip / update.norm(), max=1.0)
            delta = (1 - decay) * delta + update
    return torch.cat(outputs), delta
