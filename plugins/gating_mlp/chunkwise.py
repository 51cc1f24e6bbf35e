"""The chunkwise form of in-place TTT: the accumulated update D is kept and updated chunk by chunk.

It costs 2 d h multiply-adds a token, and its backward keeps one D per chunk.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk (fewer in the last), d width, h hidden width. D is kept
transposed, ``[B, h, d]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunkwise_in_place(
    keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, applied: Tensor, decay: float, size: int
) -> Tensor:
    """What the earlier updates add to each token's output, ``[B, T, d]``.

    Args:
        keys: ``[B, T, h]``, in chunks of ``size``; the last may be shorter.
        values: ``[B, T, d]``, scaled.
        start: ``[B, h, d]``, the accumulated update before the first chunk, or None.
        complete: ``[B or 1, N]`` bool, chunks that end in this call.
        applied: ``[B, N]`` bool, chunks whose update is applied.
        decay: share of D that is forgotten at a chunk's end.
        size: C.
    """
    delta = keys.new_zeros(keys.shape[0], keys.shape[-1], values.shape[-1]) if start is None else start
    outputs = []
    for i, (k, v) in enumerate(zip(keys.split(size, 1), values.split(size, 1), strict=True)):  # [B, C, h], [B, C, d]
        outputs.append(k @ delta)
        if (i + 1) * size < keys.shape[1]:
            delta = after_chunk(delta, k, v, complete[:, i], applied[:, i], decay)  # [B or 1] and [B]
    return torch.cat(outputs, dim=1)  # N times [B, C, d] -> [B, T, d]


def after_chunk(delta: Tensor, keys: Tensor, values: Tensor, ended: Tensor, applied: Tensor, decay: float) -> Tensor:
    """``delta [B, h, d]`` after a chunk; unchanged where it has not ``ended [B or 1]`` or is not ``applied``.

    ``keys [B, C, h]``, ``values [B, C, d]``, ``applied [B]``.
    """
    rows = (ended & applied)[:, None, None]  # [B] -> [B, 1, 1]
    return torch.where(rows, (1 - decay) * delta + keys.mT @ values, delta)
