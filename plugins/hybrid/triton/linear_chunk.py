"""TTT-Linear over a whole call by Triton kernels, differentiable.

``linear_kernels`` has the kernels.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width.
"""

from __future__ import annotations

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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, token_scale: Tensor, scale: Tensor, settings: TrainSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (batch, length, heads, width), chunks = q.shape, scale.shape[1]
        q, k, v, lr = (part.contiguous() for part in (q, k, v, lr))
        norm_w, norm_b, token_scale, scale = (
            part.float().contiguous() for part in (norm_weight, norm_bias, token_scale, scale)
        )
        g, z = (torch.empty(q.shape, device=q.device, dtype=torch.float32) for _ in range(2))
        w = g.new_empty(batch, heads, chunks + 1, width, width)
        b = g.new_empty(batch, heads, chunks + 1, width)
        w[:, :, 0], b[:, :, 0] = weight, bias[:, :, 0]  # [B, H, 1, D] -> [B, H, D]
        y = torch.empty_like(q)
        sizes, shared = (length, heads, chunks, settings.eps), _constants(settings, width)
        causal = {**shared, "CAUSAL": settings.causal}
        launch(
            "linear_states", (batch * heads,), (k, v, lr, norm_w, norm_b, scale), (w, b, g, z), sizes, shared,
            settings.warps,
        )  # fmt: skip
        launch(
            "linear_outputs", (batch * heads, chunks), (q, k, g, norm_w, norm_b, token_scale, w, b), (y,), sizes,
            causal, settings.warps,
        )  # fmt: skip
        kept_w = w[:, :, : chunks : settings.every].contiguous()  # [B, H, groups, D, D]
        ctx.save_for_backward(q, k, v, lr, norm_w, norm_b, token_scale, scale, g, z, kept_w, b)
        ctx.settings, ctx.set_dtypes = settings, [part.dtype for part in (norm_weight, norm_bias, token_scale, scale)]
        ctx.state_dtype = weight.dtype
        return y, w[:, :, -1].to(weight.dtype, copy=True), b[:, :, -1:].to(bias.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end_w: Tensor, d_end_b: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lr, norm_w, norm_b, token_scale, scale, g, z, kept_w, b = ctx.saved_tensors
        settings: TrainSettings = ctx.settings
        (batch, length, heads, width), chunks, groups = q.shape, scale.shape[1], kept_w.shape[2]
        dq, d_lr = torch.empty_like(q), torch.empty_like(lr)
        dk, dv, dg, dz, dz_query = (torch.empty_like(g) for _ in range(5))
        d_token_scale = g.new_empty(batch, heads, chunks, settings.chunk)
        of_queries = [g.new_empty(batch, heads, chunks, width) for _ in range(2)]
        of_keys = [g.new_empty(batch, heads, width) for _ in range(2)]
        d_scale, w = g.new_empty(batch, heads, chunks), g.new_empty(batch, heads, chunks + 1, width, width)
        dw, db = (each.float().clone(memory_format=torch.contiguous_format) for each in (d_end_w, d_end_b))
        shared, programs, warps = _constants(settings, width), batch * heads, settings.warps
        sizes = (length, heads, chunks)
        launch(
            "linear_weights", (programs, groups, width // shared["S"]), (k, g, scale, kept_w), (w,), sizes,
            {**shared, "EVERY": settings.every}, warps,
        )  # fmt: skip
        sizes = (*sizes, settings.eps)
        launch(
            "linear_output_gradients", (programs, chunks), (q, k, g, dy.contiguous(), norm_w, token_scale, w, b),
            (dz_query, dq, dk, dg, d_token_scale, *of_queries), sizes, {**shared, "CAUSAL": settings.causal}, warps,
        )  # fmt: skip
        launch(
            "linear_state_gradients", (programs,), (q, k, v, lr, g, z, norm_w, norm_b, scale, dz_query),
            (dg, dw, db, dz, dk, dv, d_scale, *of_keys), sizes, shared, warps,
        )  # fmt: skip
        launch(
            "linear_key_gradients", (programs, chunks), (k, v, z, norm_w, norm_b, dg, dz, dv, w), (dk, d_lr), sizes,
            shared, warps,
        )  # fmt: skip
        # [B, H, N, D] and [B, H, D] -> [H, D]
        norms = [one.sum((0, 2)) + other.sum(0) for one, other in zip(of_queries, of_keys, strict=True)]
        # [B, H, N, C] -> [C], and [B, H, N] -> [B, N]
        small = (*norms, d_token_scale.sum((0, 1, 2)), d_scale.sum(1))
        small = tuple(part.to(dtype) for part, dtype in zip(small, ctx.set_dtypes, strict=True))
        return dq, dk.to(q.dtype), dv.to(q.dtype), d_lr, dw.to(ctx.state_dtype), db.to(ctx.state_dtype), *small, None


def _constants(settings: TrainSettings, width: int) -> dict[str, Any]:
    """What all kernels take as constants, by the names of their arguments."""
    return {
        "C": settings.chunk, "D": width, "S": min(settings.slice_width, width), "PRECISION": settings.precision,
    }  # fmt: skip
