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
    another dtype than ``values``. For the backward pass they are kept as they were given: the host's own product keeps
    them too.

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
        keys = given.to(values)
        out = values.new_zeros(*keys.shape[:2], values.shape[-1])
        affinities = []
        for i, now, past in _chunks(keys.shape[1], size):
            if i:
                # now has c tokens, past i C: [B, c, h] and [B, h, i C] -> [B, c, i C]
                affinity = keys[:, now] @ keys[:, past].mT
                affinity = _weighted(affinity, weights, kept, i, size, finite, now, past)
                out[:, now].baddbmm_(affinity, values[:, past])
                if any(ctx.needs_input_grad):
                    affinities.append(affinity)
            if start is not None:
                out[:, now].baddbmm_(_decayed(_cleared(keys[:, now], finite, now), kept, i), start)
        ctx.save_for_backward(given, finite, values, start, weights, kept, *affinities)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given_keys, finite, values, start, weights, kept, *affinities = ctx.saved_tensors
        keys = _cleared(given_keys, finite).to(values)
        chunks = list(_chunks(keys.shape[1], ctx.size))
        # What the last chunk adds to itself and to its past is written over what lies there, and the rest is added.
        fresh = torch.empty_like if len(chunks) > 1 else torch.zeros_like
        grad_keys, grad_values = fresh(keys), torch.zeros_like(values)
        grad_start = None if start is None else torch.zeros_like(start)
        for i, now, past in reversed(chunks):
            given = grad[:, now]  # [B, c, d]
            if i:
                # [B, c, d] and [B, d, i C] -> [B, c, i C]
                grad_affinity = given @ values[:, past].mT
                grad_affinity = _weighted(grad_affinity, weights, kept, i, ctx.size, finite, now, past)
                before = 0 if i == len(chunks) - 1 else 1
                # [B, c, i C] and [B, i C, h]; [B, i C, c] and [B, c, h]
                grad_keys[:, now].baddbmm_(grad_affinity, keys[:, past], beta=before)
                grad_keys[:, past].baddbmm_(grad_affinity.mT, keys[:, now], beta=before)
                if torch.is_grad_enabled():  # a second derivative needs the affinity as a function of the keys
                    affinity = keys[:, now] @ keys[:, past].mT  # [B, c, i C]
                    affinity = _weighted(affinity, weights, kept, i, ctx.size, None, now, past)
                else:
                    affinity = affinities[i - 1]
                grad_values[:, past].baddbmm_(affinity.mT, given)  # [B, i C, c] and [B, c, d]
            if start is not None:
                given = _decayed(given, kept, i)
                grad_keys[:, now].baddbmm_(_cleared(given, finite, now), start.mT)  # [B, c, d] and [B, d, h]
                assert grad_start is not None
                grad_start.baddbmm_(keys[:, now].mT, given)  # [B, h, c] and [B, c, d]
        return grad_keys.to(given_keys), None, grad_values, grad_start, None, None, None


def _cleared(tokens: Tensor, finite: Tensor | None, at: slice = slice(None)) -> Tensor:
    """``tokens [B, c, any]``, those ``at`` which they lie in the call, with zero where not ``finite [B, T, 1]``."""
    return tokens if finite is None else torch.where(finite[:, at], tokens, 0)


def _chunks(length: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Index, tokens of the chunk, tokens before it."""
    for i, first in enumerate(range(0, length, size)):
        yield i, slice(first, min(first + size, length)), slice(0, first)


def _decayed(tokens: Tensor, kept: Tensor | None, i: int) -> Tensor:
    """``tokens [B, c, any]`` of chunk i times what is left of the start there, ``kept [B, N]``; None: all of it."""
    return tokens if kept is None else tokens * kept[:, i, None, None]


def _weighted(
    affinity: Tensor, weights: Tensor, kept: Tensor | None, i: int, size: int, finite: Tensor | None, now: slice,
    past: slice,
) -> Tensor:  # fmt: skip
    """``affinity [B, c, i C]`` of chunk i's tokens ``now`` and those before, times the weights of their chunks.

    Zero where a weight is 0, and where one of the two is not ``finite [B, T, 1]``: there it may be nan. In place.
    """
    weight = weights[:, i, :i].repeat_interleave(size, dim=1)[:, None]  # [B, i] -> [B, i C] -> [B, 1, i C]
    unread = weight == 0
    if kept is not None:  # else each is 0 or 1
        affinity = affinity.mul_(weight)
    if finite is not None:
        unread = unread | ~finite[:, past].mT  # [B, i C, 1] -> [B, 1, i C]
        affinity = affinity.masked_fill_(~finite[:, now], 0)  # [B, c, 1] over [B, c, i C]
    return affinity.masked_fill_(unread, 0)


def prefers_parallel(tokens: int, width: int, hidden: int) -> bool:
    """Whether the parallel form does less work than the chunkwise one for this many tokens."""
    return tokens * (hidden + width) < 4 * width * hidden
