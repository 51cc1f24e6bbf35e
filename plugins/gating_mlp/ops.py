"""In-place TTT on a gated MLP's down projection: targets, and two equal ways to apply all earlier chunks' updates.

Chunk i is computed with W_0 + D_i, where D_0 is given and D_{i+1} = (1 - decay) D_i + s_i sum_c v_c k_c^T over the
tokens c of chunk i (keys k: the hidden activation; values v: learning rate times the filtered target; s_i: clipping).

- ``running_sum`` keeps D. It costs 2 d h multiply-adds a token, and its backward keeps one D per chunk.
- ``gram`` never builds D: what chunk i gets from chunk j < i is (1 - decay)^(i-1-j) s_j (k_i k_j^T) v_j, masked linear
  attention. It costs about T (h + d) / 2 a token, and its backward keeps T^2 / 2 numbers.

Shape legend: B streams, N chunks, C tokens a chunk, d width, h hidden width, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def left_padding(kernel: int, padding: str) -> int:
    """Taps that look back: all but one when causal; (K - 1) // 2 when centered."""
    return kernel - 1 if padding == "causal" else (kernel - 1) // 2


def filtered(target: Tensor, conv: Tensor, left: int) -> Tensor:
    """Depthwise filter inside each chunk: ``target [B, N, C, d]``, ``conv [d, 1, K]``, zero beyond a chunk's edges."""
    size, taps = target.shape[2], conv.shape[-1]
    padded = F.pad(target, (0, 0, left, taps - 1 - left))
    # One fused multiply-add a tap: a depthwise convolution over the second-last dimension is many times slower.
    total = padded[:, :, :size] * conv[:, 0, 0]
    for tap in range(1, taps):
        total = torch.addcmul(total, padded[:, :, tap : tap + size], conv[:, 0, tap])
    return total


def clip_scale(keys: Tensor, values: Tensor, clip: float | None) -> Tensor | None:
    """``[B, N]``: min(1, clip / ||V^T K||_F) of each chunk's update, without building it; None without ``clip``."""
    if clip is None:
        return None
    square = ((keys @ keys.mT) * (values @ values.mT)).sum((-1, -2))
    # The gradient of a square root at zero is infinite: an update of zero is scaled by one, whatever its norm's slope.
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    return torch.where(square > 0, (clip / norm).clamp(max=1.0), torch.ones_like(norm))


def running_sum(keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, decay: float) -> Tensor:
    """What the earlier updates add to each token's output, ``[B, N, C, d]``.

    Args:
        keys: ``[B, N, C, h]``.
        values: ``[B, N, C, d]``, scaled.
        start: ``[B, d, h]``, the accumulated update before the first chunk, or None.
        complete: ``[B or 1, N]`` bool, chunks that end in this call.
    """
    delta = values.new_zeros(values.shape[0], values.shape[-1], keys.shape[-1]) if start is None else start
    outputs = []
    for k, v, done in zip(keys.unbind(1), values.unbind(1), complete.unbind(1), strict=True):
        outputs.append(k @ delta.mT)
        delta = torch.where(done.view(-1, 1, 1), (1 - decay) * delta + v.mT @ k, delta)
    return torch.stack(outputs, dim=1)


def gram(keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, decay: float) -> Tensor:
    """The same as ``running_sum``, as masked linear attention.

    A chunk that does not end in this call is the last one of its row, so no token looks back at it: ``complete`` is not
    needed.
    """
    chunk_keys, chunk_values = keys.unbind(1), values.unbind(1)
    outputs = [torch.zeros_like(chunk_values[0])]
    for i in range(1, len(chunk_keys)):
        # Pair by pair: joining the past would keep a copy of it for each chunk's backward, and the gradient of a slice
        # of the whole is as large as the whole.
        total = torch.zeros_like(chunk_values[0])
        for j in range(i):
            affinity = chunk_keys[i] @ chunk_keys[j].mT
            total = torch.baddbmm(total, affinity, chunk_values[j], alpha=(1 - decay) ** (i - 1 - j))
        outputs.append(total)
    y = torch.stack(outputs, dim=1)
    if start is not None:
        kept = (1 - decay) ** torch.arange(keys.shape[1], device=keys.device, dtype=keys.dtype)
        y = y + (keys @ start[:, None].mT) * kept.view(1, -1, 1, 1)
    return y


def final_delta(keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, decay: float) -> Tensor:
    """``[B, d, h]``: the accumulated update after the last complete chunk; one product where nothing decays."""
    weighted = torch.where(complete[..., None, None], values, 0)
    count = complete.sum(1, keepdim=True)
    if decay:
        index = torch.arange(keys.shape[1], device=keys.device)
        age = (count - 1 - index).clamp(min=0).to(keys.dtype)
        weighted = weighted * ((1 - decay) ** age)[..., None, None]
    delta = weighted.flatten(1, 2).mT @ keys.flatten(1, 2)
    if start is None:
        return delta
    return delta + start * ((1 - decay) ** count.to(keys.dtype)).view(-1, 1, 1)


def prefers_gram(tokens: int, width: int, hidden: int) -> bool:
    """Whether the Gram form does less work than the running sum for this many tokens."""
    return tokens * (hidden + width) < 4 * width * hidden
