"""The parallel form of in-place TTT, masked linear attention, with a backward of its own.

D is never built: what chunk i gets from chunk j < i is (1 - decay)^n s_j (k_i k_j^T) v_j, n the updates made between
them. It costs about T (h + d) / 2 multiply-adds a token, and its backward keeps T^2 / 2 numbers.

Each chunk is multiplied with all of the past at once: the past is a prefix of one tensor, so nothing is joined or
copied, and gradients are added in place. With autograd, the gradient of every slice would be as large as the whole.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk (fewer in the last), d width, h hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def parallel_in_place(
    keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, applied: Tensor, decay: float, size: int,
    finite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``chunkwise_in_place`` as masked linear attention; the same arguments.

    ``finite [B, T, 1]``: tokens whose key counts, where the others' are still to be taken as zero, and keys may have
    another dtype than ``values``. The backward pass then keeps the keys as they were given, which the host's own
    product keeps too.

    A chunk that does not end in this call is the last one of its row, so no token reads its update: ``complete`` is not
    needed.
    """
    weights, kept = applied.to(values.dtype)[:, None].expand(-1, applied.shape[1], -1), None  # [B, N] -> [B, N, N]
    if decay:
        made = applied.to(values.dtype).cumsum(1)  # [B, N], updates up to each chunk's end
        before = made - applied.to(values.dtype)
        age = (before[:, :, None] - made[:, None]).clamp(min=0)  # [B, N, N], updates after chunk j and before chunk i
        weights, kept = weights * torch.pow(1 - decay, age), torch.pow(1 - decay, before)
    result: Tensor = _Parallel.apply(keys, finite, values, start, weights, kept, size)  # type: ignore[no-untyped-call]
    return result


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, finite: Tensor | None, values: Tensor, start: Tensor | None, weights: Tensor,
        kept: Tensor | None, size: int,
    ) -> Tensor:  # fmt: skip
        keys = _cleared(given, finite, values)
        out = values.new_zeros(*keys.shape[:2], values.shape[-1])
        affinities = []
        for i, now, past in _chunks(keys.shape[1], size):
            if i:
                # now has c tokens, past i C: [B, c, h] and [B, h, i C] -> [B, c, i C]
                affinity = _weighted(keys[:, now] @ keys[:, past].mT, weights, i, size)
                out[:, now].baddbmm_(affinity, values[:, past])
                if any(ctx.needs_input_grad):
                    affinities.append(affinity)
            if start is not None:
                out[:, now].baddbmm_(_decayed(keys[:, now], kept, i), start)
        ctx.save_for_backward(given, finite, values, start, weights, kept, *affinities)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given_keys, finite, values, start, weights, kept, *affinities = ctx.saved_tensors
        keys = _cleared(given_keys, finite, values)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        grad_start = None if start is None else torch.zeros_like(start)
        for i, now, past in _chunks(keys.shape[1], ctx.size):
            given = grad[:, now]  # [B, c, d]
            if i:
                # [B, c, d] and [B, d, i C] -> [B, c, i C]
                grad_affinity = _weighted(given @ values[:, past].mT, weights, i, ctx.size)
                grad_keys[:, now].baddbmm_(grad_affinity, keys[:, past])  # [B, c, i C] and [B, i C, h]
                grad_keys[:, past].baddbmm_(grad_affinity.mT, keys[:, now])  # [B, i C, c] and [B, c, h]
                if torch.is_grad_enabled():  # a second derivative needs the affinity as a function of the keys
                    affinity = _weighted(keys[:, now] @ keys[:, past].mT, weights, i, ctx.size)  # [B, c, i C]
                else:
                    affinity = affinities[i - 1]
                grad_values[:, past].baddbmm_(affinity.mT, given)  # [B, i C, c] and [B, c, d]
            if start is not None:
                given = _decayed(given, kept, i)
                grad_keys[:, now].baddbmm_(given, start.mT)  # [B, c, d] and [B, d, h]
                assert grad_start is not None
                grad_start.baddbmm_(keys[:, now].mT, given)  # [B, h, c] and [B, c, d]
        if finite is not None:
            del keys  # its memory is free for the gradient in the host's dtype
            grad_keys = grad_keys.masked_fill_(~finite, 0).to(given_keys)  # [B, T, 1] over [B, T, h]
        return grad_keys, None, grad_values, grad_start, None, None, None


def _cleared(keys: Tensor, finite: Tensor | None, like: Tensor) -> Tensor:
    """``keys [B, T, h]`` in the dtype of ``like``, zero for tokens that are not ``finite [B, T, 1]``."""
    return keys if finite is None else torch.where(finite, keys, 0).to(like)


def _chunks(length: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Index, tokens of the chunk, tokens before it."""
    for i, first in enumerate(range(0, length, size)):
        yield i, slice(first, min(first + size, length)), slice(0, first)


def _decayed(tokens: Tensor, kept: Tensor | None, i: int) -> Tensor:
    """``tokens [B, c, any]`` of chunk i times what is left of the start there, ``kept [B, N]``; None: all of it."""
    return tokens if kept is None else tokens * kept[:, i, None, None]


def _weighted(affinity: Tensor, weights: Tensor, i: int, size: int) -> Tensor:
    """``affinity [B, c, i C]`` of chunk i times the weights of the chunks before it; where one is 0 it may be nan."""
    weight = weights[:, i, :i].repeat_interleave(size, dim=1)[:, None]  # [B, i] -> [B, i C] -> [B, 1, i C]
    return affinity.mul_(weight).masked_fill_(weight == 0, 0)


def prefers_parallel(tokens: int, width: int, hidden: int) -> bool:
    """Whether the parallel form does less work than the chunkwise one for this many tokens."""
    return tokens * (hidden + width) < 4 * width * hidden
