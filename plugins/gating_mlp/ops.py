"""In-place TTT on a gated MLP's down projection: what it computes, its targets, and clipping.

Chunk i is computed with W_0 + P^T D_i, where D_0 is given and D_{i+1} = (1 - decay) D_i + s_i sum_c v_c k_c^T over the
tokens c of chunk i (keys k: the hidden activation; values v: learning rate times the filtered target; s_i: clipping).
A chunk that makes no update, s_i = 0, leaves D_i as it is: nothing decays.
The projection P of the target is linear in v, so it is applied once to what D gives, not to every value.

Four forms compute it: ``naive`` from the definition; two for a call of many tokens, ``chunkwise``, which keeps D, and
``parallel``, which never builds it; and ``recurrent`` for one streamed token.

The update of a chunk is skipped (s_i = 0) where a key, target or rate in it is not finite, or so large that sums of
their products may not stay finite, and where all of its tokens have updates disabled.

Shape legend: B streams, N chunks, C tokens a chunk (fewer in the last), d width, h hidden width, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.deprecation import moved_names


def left_padding(kernel: int, padding: str) -> int:
    """Taps that look back: all but one when causal; (K - 1) // 2 when centered."""
    return kernel - 1 if padding == "causal" else (kernel - 1) // 2


def filtered(target: Tensor, conv: Tensor, left: int, beyond: int = 0) -> Tensor:
    """Depthwise filter inside each chunk: ``target [B, N, C, d]``, ``conv [d, 1, K]``, zero beyond a chunk's edges.

    Gives ``[B, N, C + beyond, d]``: the last ``beyond`` are what this chunk's tokens would add past its end.
    """
    taps = conv.shape[-1]
    padded = F.pad(target, (0, 0, left, taps - 1 - left + beyond))  # [B, N, C + K - 1 + beyond, d]
    result: Tensor = _Filtered.apply(padded, conv)  # type: ignore[no-untyped-call]
    return result


class _Filtered(torch.autograd.Function):
    """``padded [B, N, C + K - 1, d]`` and ``conv [d, 1, K]`` to ``[B, N, C, d]``, for any C.

    One fused multiply-add a tap, in place: a depthwise convolution over the second-last dimension is many times slower.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, conv: Tensor) -> Tensor:
        ctx.save_for_backward(padded, conv)
        size = padded.shape[2] - conv.shape[-1] + 1
        total = padded[:, :, :size] * conv[:, 0, 0]
        for tap in range(1, conv.shape[-1]):
            total.addcmul_(padded[:, :, tap : tap + size], conv[:, 0, tap])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, conv = ctx.saved_tensors
        size, grad_padded, grad_conv = grad.shape[2], None, None
        if ctx.needs_input_grad[0]:
            grad_padded = torch.zeros_like(padded)
            for tap in range(conv.shape[-1]):
                grad_padded[:, :, tap : tap + size].addcmul_(grad, conv[:, 0, tap])
        if ctx.needs_input_grad[1]:
            taps = [(grad * padded[:, :, tap : tap + size]).sum((0, 1, 2)) for tap in range(conv.shape[-1])]  # [d]
            grad_conv = torch.stack(taps, dim=-1)[:, None]  # [d, K] -> [d, 1, K]
        return grad_padded, grad_conv


def squared_norm(keys: Tensor, values: Tensor) -> Tensor:
    """``[..., C]`` float64: what each token adds to ||sum_c v_c k_c^T||_F^2 given those before it, without that sum.

    ||sum_c v_c k_c^T||_F^2 = sum_(c, c') (k_c . k_c') (v_c . v_c'). Where the tokens' updates cancel, so do these
    terms: with norms that add to r times the norm of their sum, the result's relative error is r^2 times that of a
    product. In float64 that is 1e-8 for r = 10,000; in float32 it would be 6.

    Args:
        keys: ``[..., C, h]``, any floating dtype.
        values: ``[..., C, d]``, projected.
    """
    keys, values = keys.double(), values.double()
    products = (keys @ keys.mT) * (values @ values.mT)  # [..., C, C]
    # A pair of different tokens counts twice, with the later one.
    return (products.tril() + products.tril(-1)).sum(-1)


PRECISE_BITS = 48
"""Bits of a number that is kept in parts."""


def num_parts(dtype: torch.dtype) -> int:
    """How many numbers of ``dtype`` together hold ``PRECISE_BITS``: 1 in float64, 2 in float32, 6 in bfloat16."""
    bits = 1 - round(math.log2(torch.finfo(dtype).eps))
    return -(-PRECISE_BITS // bits)


def norm_in_parts(square: Tensor, dtype: torch.dtype) -> Tensor:
    """The root of ``square [...]`` float64 as ``[..., num_parts]`` in ``dtype``; each part is what is left of it.

    The root, because a square may be beyond float32.
    """
    parts, rest = [], square.clamp(min=0).sqrt()
    for _ in range(num_parts(dtype)):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    return torch.stack(parts, dim=-1)


def square_of_parts(norm: Tensor) -> Tensor:
    """``[...]`` float64: the square that ``norm_in_parts`` was made of, ``norm [..., parts]``."""
    return norm.double().sum(-1).square()


def clip_scale(square: Tensor, clip: float) -> Tensor:
    """min(1, clip / norm) of updates with squared norms ``square``, of any shape and dtype; zero where not finite."""
    # The gradient of a square root at zero is infinite: an update of zero is scaled by one, whatever its norm's slope.
    positive = square > 0
    scale = (clip / torch.where(positive, square, torch.ones_like(square)).sqrt()).clamp(max=1.0)
    return torch.where(square.isfinite(), torch.where(positive, scale, torch.ones_like(scale)), 0)


__getattr__ = moved_names(
    __name__,
    None,
    {
        "after_chunk": "moshi_ttt.plugins.gating_mlp.chunkwise:after_chunk",
        "prefers_gram": "moshi_ttt.plugins.gating_mlp.parallel:prefers_parallel",
        "running_sum": "moshi_ttt.plugins.gating_mlp.chunkwise:chunkwise_in_place",
    },
)
