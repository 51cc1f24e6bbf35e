"""TTT-Linear over a whole call by Triton kernels, differentiable.

``linear_kernels`` has the kernels.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.triton.train_launches import launch
from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings


def linear_chunks(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    token_scale: Tensor, scale: Tensor, settings: TrainSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """TTT-Linear over T tokens that begin at a chunk's start, with the inner LayerNorm.

    Args:
        q, k, v: ``[B, T, H, D]``; the target is v - k.
        lr: ``[B, T, H]``.
        weight, bias: where to start, ``[B, H, D, D]`` and ``[B, H, 1, D]``.
        norm_weight, norm_bias: ``[H, D]``.
        token_scale: ``[C]``, per query position.
        scale: ``[B, N]``, of each chunk's update; 0 where there is none.

    Returns:
        ``y [B, T, H, D]``, and weight and bias after the last update, in the dtype of ``q``. Sums are float32.
    """
    y, end_w, end_b = _Linear.apply(q, k, v, lr, weight, bias, norm_weight, norm_bias, token_scale, scale, settings)  # type: ignore[no-untyped-call]
    return y, end_w, end_b


class LinearChunks:
    """The two passes over a call's chunks, as launches.

    Args:
        shape: of the queries, ``[B, T, H, D]``.
    """

    def __init__(self, shape: torch.Size, settings: TrainSettings) -> None:
        self.shape, self.settings, self.constants = shape, settings, _constants(settings, shape[-1])
        self.causal = {**self.constants, "CAUSAL": settings.causal}
        self.chain = {**self.constants, "GIVEN": settings.given}

    def forward(
        self, tokens: Sequence[Tensor], small: Sequence[Tensor], fast: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``y [B, T, H, D]``, the fast weights after the last update, and what ``backward`` needs beside the arguments.

        Args:
            tokens: q, k, v and lr, contiguous.
            small: the norm's weight and bias, token scale, and the scales of updates, float32 and contiguous.
            fast: W and b, in any dtype.
        """
        (q, k, v, lr), (norm_w, norm_b, token_scale, scale), (weight, bias) = tokens, small, fast
        (batch, length, heads, width), chunks, warps = self.shape, scale.shape[1], self.settings.warps
        g, z = (torch.empty(q.shape, device=q.device, dtype=torch.float32) for _ in range(2))
        w = g.new_empty(batch, heads, chunks + 1, width, width)
        b = g.new_empty(batch, heads, chunks + 1, width)
        w[:, :, 0], b[:, :, 0] = weight, bias[:, :, 0]  # [B, H, 1, D] -> [B, H, D]
        y, programs, sizes = torch.empty_like(q), batch * heads, (length, heads, chunks, self.settings.eps)
        launch("linear_states", (programs,), (k, v, lr, norm_w, norm_b, scale), (w, b, g, z), sizes, self.chain, warps)
        launch(
            "linear_outputs", (programs, chunks), (q, k, g, norm_w, norm_b, token_scale, w, b), (y,), sizes,
            self.causal, warps,
        )  # fmt: skip
        kept_w = w[:, :, : chunks : self.settings.every].contiguous()  # [B, H, groups, D, D]
        end = (w[:, :, -1].to(weight.dtype, copy=True), b[:, :, -1:].to(bias.dtype, copy=True))
        return y, end, (g, z, kept_w, b, y)

    def outputs(self, q: Tensor, small: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """``y``, which ``forward`` kept."""
        return kept[4]

    def backward(
        self, tokens: Sequence[Tensor], small: Sequence[Tensor], fast: Sequence[Tensor], kept: Sequence[Tensor],
        dy: Tensor, d_end: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """The gradients of ``tokens``, ``small`` and ``fast``, in their order. ``fast`` is not read.

        ``d_end``: of the fast weights after the call; they become those before it.
        """
        (q, k, v, lr), (norm_w, norm_b, token_scale, scale), (g, z, kept_w, b) = tokens, small, kept[:4]
        (batch, length, heads, width), chunks, groups = self.shape, scale.shape[1], kept_w.shape[2]
        dq, d_lr, (dw, db) = torch.empty_like(q), torch.empty_like(lr), d_end
        dk, dv, dg, dz, dz_query = (torch.empty_like(g) for _ in range(5))
        d_token_scale = g.new_empty(batch, heads, chunks, self.settings.chunk)
        of_queries = [g.new_empty(batch, heads, chunks, width) for _ in range(2)]
        of_keys = [g.new_empty(batch, heads, width) for _ in range(2)]
        d_scale, w = g.new_empty(batch, heads, chunks), g.new_empty(batch, heads, chunks + 1, width, width)
        programs, warps, sizes = batch * heads, self.settings.warps, (length, heads, chunks)
        launch(
            "linear_weights", (programs, groups, width // self.constants["S"]), (k, g, scale, kept_w), (w,), sizes,
            {**self.constants, "EVERY": self.settings.every}, warps,
        )  # fmt: skip
        given: tuple[Tensor, ...] = (q, k, g, dy.contiguous(), norm_w, token_scale, w, b)
        numbers = (*sizes, self.settings.eps)
        launch(
            "linear_output_gradients", (programs, chunks), given,
            (dz_query, dq, dk, dg, d_token_scale, *of_queries), numbers, self.causal, warps,
        )  # fmt: skip
        given = (q, k, v, lr, g, z, norm_w, norm_b, scale, dz_query)
        launch(
            "linear_state_gradients", (programs,), given, (dg, dw, db, dz, dk, dv, d_scale, *of_keys), numbers,
            self.chain, warps,
        )  # fmt: skip
        given = (k, v, z, norm_w, norm_b, dg, dz, dv, w)
        launch("linear_key_gradients", (programs, chunks), given, (dk, d_lr), numbers, self.constants, warps)
        # [B, H, N, D] and [B, H, D] -> [H, D]
        norms = [one.sum((0, 2)) + other.sum(0) for one, other in zip(of_queries, of_keys, strict=True)]
        # [B, H, N, C] -> [C], and [B, H, N] -> [B, N]
        return [dq, dk, dv, d_lr], [*norms, d_token_scale.sum((0, 1, 2)), d_scale.sum(1)], [dw, db]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, token_scale: Tensor, scale: Tensor, settings: TrainSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = (norm_weight, norm_bias, token_scale, scale)
        tokens = tuple(part.contiguous() for part in (q, k, v, lr))
        small = tuple(part.float().contiguous() for part in given)
        ctx.chunks = LinearChunks(q.shape, settings)
        y, end, kept = ctx.chunks.forward(tokens, small, (weight, bias))
        ctx.save_for_backward(*tokens, *small, *kept[:4])
        ctx.dtypes = [each.dtype for each in (q, k, v, lr, weight, bias, *given)]
        return y, *end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_end: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        d_fast = tuple(each.float().clone(memory_format=torch.contiguous_format) for each in d_end)
        of_tokens, of_small, of_fast = ctx.chunks.backward(saved[:4], saved[4:8], (), saved[8:], dy, d_fast)
        found = (*of_tokens, *of_fast, *of_small)
        return *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None


def _constants(settings: TrainSettings, width: int) -> dict[str, Any]:
    """What all kernels take as constants, by the names of their arguments."""
    return {
        "C": settings.chunk, "D": width, "S": min(settings.slice_width, width), "PRECISION": settings.precision,
    }  # fmt: skip
