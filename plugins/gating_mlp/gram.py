"""The Gram form of in-place TTT with a backward of its own.

Chunk by chunk against all of the past at once: the past is a prefix of one tensor, so nothing is joined or copied, and
gradients are added up in place. Left to autograd, the gradient of every slice is as large as the whole.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk (fewer in the last), d width, h hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def gram(
    keys: Tensor, values: Tensor, start: Tensor | None, complete: Tensor, taught: Tensor, decay: float, size: int
) -> Tensor:
    """``ops.running_sum`` as masked linear attention: (1 - decay)^n (k_i k_j^T) v_j over the chunks j < i.

    n is how many of the chunks between them made an update. A chunk that does not end in this call is the last one of
    its row, so no token looks back at it: ``complete`` is not needed.
    """
    weights, kept = taught.to(keys.dtype)[:, None].expand(-1, taught.shape[1], -1), None  # [B, N, N]
    if decay:
        made = taught.to(keys.dtype).cumsum(1)  # [B, N], updates up to each chunk's end
        before = made - taught.to(keys.dtype)
        age = (before[:, :, None] - made[:, None]).clamp(min=0)  # updates after chunk j and before chunk i
        weights, kept = weights * torch.pow(1 - decay, age), torch.pow(1 - decay, before)
    result: Tensor = _Gram.apply(keys, values, start, weights, kept, size)  # type: ignore[no-untyped-call]
    return result


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, start: Tensor | None, weights: Tensor, kept: Tensor | None, size: int
    ) -> Tensor:
        out = values.new_zeros(*keys.shape[:2], values.shape[-1])
        affinities = []
        for i, now, past in _chunks(keys.shape[1], size):
            if i:
                affinity = _weighted(keys[:, now] @ keys[:, past].mT, weights, i, size)
                out[:, now].baddbmm_(affinity, values[:, past])
                if any(ctx.needs_input_grad):
                    affinities.append(affinity)
            if start is not None:
                out[:, now].baddbmm_(_decayed(keys[:, now], kept, i), start)
        ctx.save_for_backward(keys, values, start, weights, kept, *affinities)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, start, weights, kept, *affinities = ctx.saved_tensors
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        grad_start = None if start is None else torch.zeros_like(start)
        for i, now, past in _chunks(keys.shape[1], ctx.size):
            given = grad[:, now]
            if i:
                grad_affinity = _weighted(given @ values[:, past].mT, weights, i, ctx.size)
                grad_keys[:, now].baddbmm_(grad_affinity, keys[:, past])
                grad_keys[:, past].baddbmm_(grad_affinity.mT, keys[:, now])
                if torch.is_grad_enabled():  # who differentiates again needs the affinity as a function of the keys
                    affinity = _weighted(keys[:, now] @ keys[:, past].mT, weights, i, ctx.size)
                else:
                    affinity = affinities[i - 1]
                grad_values[:, past].baddbmm_(affinity.mT, given)
            if start is not None:
                given = _decayed(given, kept, i)
                grad_keys[:, now].baddbmm_(given, start.mT)
                assert grad_start is not None
                grad_start.baddbmm_(keys[:, now].mT, given)
        return grad_keys, grad_values, grad_start, None, None, None


def _chunks(length: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Index, tokens of the chunk, tokens before it."""
    for i, first in enumerate(range(0, length, size)):
        yield i, slice(first, min(first + size, length)), slice(0, first)


def _decayed(tokens: Tensor, kept: Tensor | None, i: int) -> Tensor:
    """``tokens [B, c, any]`` of chunk i times what is left of the start there, ``kept [B, N]``; None: all of it."""
    return tokens if kept is None else tokens * kept[:, i, None, None]


def _weighted(affinity: Tensor, weights: Tensor, i: int, size: int) -> Tensor:
    """``affinity [B, c, i C]`` of chunk i times the weights of the chunks before it; what has none may be nan."""
    weight = weights[:, i, :i].repeat_interleave(size, dim=1)[:, None]
    return affinity.mul_(weight).masked_fill_(weight == 0, 0)
