"""TTT-Linear over a whole call by Triton kernels, differentiable.

``linear_kernels`` has the kernels.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.triton import linear_kernels as kernels
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
        q, k, v, lr, weight, bias = (part.contiguous() for part in (q, k, v, lr, weight, bias))
        norm_w, norm_b, token_scale, scale = (
            part.float().contiguous() for part in (norm_weight, norm_bias, token_scale, scale)
        )
        groups = -(-chunks // settings.every)
        g, z = (torch.empty(q.shape, device=q.device, dtype=torch.float32) for _ in range(2))
        kept_w = g.new_empty(batch, heads, groups, width, width)
        kept_b = g.new_empty(batch, heads, groups, width)
        y, end_w, end_b = torch.empty_like(q), torch.empty_like(weight), torch.empty_like(bias)
        sizes = (length, heads, chunks, settings.eps)
        shared = {"C": settings.chunk, "D": width, "EVERY": settings.every, "PRECISION": settings.precision}
        kernels.linear_states[(batch * heads,)](
            k, v, lr, norm_w, norm_b, scale, weight, bias, g, z, kept_w, kept_b, end_w, end_b, *sizes, **shared,
            num_warps=settings.warps, num_stages=1,
        )  # fmt: skip
        kernels.linear_outputs[(batch * heads, groups)](
            q, k, g, norm_w, norm_b, token_scale, scale, kept_w, kept_b, y, *sizes, **shared, CAUSAL=settings.causal,
            num_warps=settings.warps, num_stages=1,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, lr, norm_w, norm_b, token_scale, scale, g, z, kept_w, kept_b)
        ctx.settings, ctx.set_dtypes = settings, [part.dtype for part in (norm_weight, norm_bias, token_scale, scale)]
        ctx.state_dtype = weight.dtype
        return y, end_w, end_b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end_w: Tensor, d_end_b: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lr, norm_w, norm_b, token_scale, scale, g, z, kept_w, kept_b = ctx.saved_tensors
        settings: TrainSettings = ctx.settings
        (batch, length, heads, width), chunks, groups = q.shape, scale.shape[1], kept_w.shape[2]
        dq, dv, d_lr = torch.empty_like(q), torch.empty_like(v), torch.empty_like(lr)
        dk, dg, dz, dz_query = (torch.empty_like(g) for _ in range(4))
        d_token_scale = g.new_empty(batch, heads, groups, settings.chunk)
        d_norm_w, d_norm_b = (g.new_empty(batch, heads, groups + 1, width) for _ in range(2))
        queries = [part.view(-1)[: batch * heads * groups * width] for part in (d_norm_w, d_norm_b)]
        keys = [part.view(-1)[batch * heads * groups * width :] for part in (d_norm_w, d_norm_b)]
        d_scale = g.new_empty(batch, heads, chunks)
        dw, db = g.new_empty(batch, heads, width, width), g.new_empty(batch, heads, 1, width)
        dy, d_end_w, d_end_b = dy.contiguous(), d_end_w.float().contiguous(), d_end_b.float().contiguous()
        sizes = (length, heads, chunks)
        shared = {"C": settings.chunk, "D": width, "PRECISION": settings.precision}
        launch = {"num_warps": settings.warps, "num_stages": 1}
        kernels.linear_output_gradients[(batch * heads, groups)](
            q, k, g, dy, norm_w, norm_b, token_scale, scale, kept_w, kept_b, dz_query, dq, dk, dg, d_token_scale,
            *queries, *sizes, settings.eps, **shared, EVERY=settings.every, CAUSAL=settings.causal, **launch,
        )  # fmt: skip
        kernels.linear_state_gradients[(batch * heads,)](
            q, k, v, lr, g, z, norm_w, norm_b, scale, dz_query, dg, d_end_w, d_end_b, dz, dk, dv, d_lr, d_scale, dw,
            db, *keys, *sizes, settings.eps, **shared, **launch,
        )  # fmt: skip
        kernels.linear_key_gradients[(batch * heads, groups)](
            k, g, dz, scale, kept_w, dk, *sizes, **shared, EVERY=settings.every, **launch
        )
        return _returned(ctx, q, (dq, dk, dv, d_lr, dw, db), (queries, keys), d_token_scale, d_scale)


def _returned(
    ctx: Any, q: Tensor, found: tuple[Tensor, ...], norms: tuple[list[Tensor], list[Tensor]], d_token_scale: Tensor,
    d_scale: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients in the order and dtypes of the arguments; the programs' parts are summed."""
    dq, dk, dv, d_lr, dw, db = found
    batch, _, heads, width = q.shape
    # [B H groups D] -> [B, H, groups, D] -> [H, D], and [B H D] -> [B, H, D] -> [H, D]
    d_norm = [
        of_queries.view(batch, heads, -1, width).sum((0, 2)) + of_keys.view(batch, heads, width).sum(0)
        for of_queries, of_keys in zip(*norms, strict=True)
    ]
    # [B, H, groups, C] -> [C], and [B, H, N] -> [B, N]
    small = (*d_norm, d_token_scale.sum((0, 1, 2)), d_scale.sum(1))
    small = tuple(part.to(dtype) for part, dtype in zip(small, ctx.set_dtypes, strict=True))
    return dq, dk.to(q.dtype), dv, d_lr, dw.to(ctx.state_dtype), db.to(ctx.state_dtype), *small, None
