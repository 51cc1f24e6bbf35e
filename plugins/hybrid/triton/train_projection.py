"""Projections of a training call that keep nothing between the passes but their input and their parameters.

``torch.nn.functional.linear`` on cast parameters keeps the copies, and the input with its masked tokens. Here both are
made again in the backward pass.

Shape legend: B rows, T tokens, N width of the host, M width of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of
from moshi_ttt.plugins.hybrid.triton.train_launches import launch


def projected(x: Tensor, linears: Sequence[Linear], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """``x W^T + b`` for each of ``linears``, computed in its dtype, as ``Linear`` does.

    Args:
        x: ``[B, T, N]``.
        linears: weights ``[M, N]`` and biases ``[M]``.
    """
    parameters = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return tuple(_Projections.apply(x, False, tuple(dtypes), *parameters))  # type: ignore[no-untyped-call]


def projected_where_finite(
    x: Tensor, linears: Sequence[Linear], dtypes: Sequence[torch.dtype]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``projected`` of x with zeros for tokens that may not enter the layer; ``[B, T]`` uint8, 1 for those that may.

    Those may that are below ``largest_factor`` of float32, which a nan is not. The others get no gradient from here.
    """
    parameters = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    *found, finite = _Projections.apply(x, True, tuple(dtypes), *parameters)  # type: ignore[no-untyped-call]
    return tuple(found), finite


def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, T, N]`` with zeros for tokens that may not enter the layer; ``[B, T]`` uint8, 1 for those that may."""
    batch, length, width = x.shape
    kept, finite = torch.empty_like(x), torch.empty(batch, length, dtype=torch.uint8, device=x.device)
    numbers, constants = (largest_factor(torch.float32),), {"N": width, "BN": block_of(width)}
    launch("token_mask", (batch * length,), (x,), (kept, finite), numbers, constants, 8 if width >= 2048 else 4)
    return kept, finite


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, masks: bool, dtypes: tuple[torch.dtype, ...], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.masks, ctx.dtypes = masks, dtypes
        x = x.contiguous()
        ctx.save_for_backward(x, *parameters)
        given, finite = masked(x) if masks else (x, None)
        casts = {dtype: given.to(dtype) for dtype in dict.fromkeys(dtypes)}
        outputs = tuple(
            F.linear(casts[dtype], weight.to(dtype), bias.to(dtype))
            for dtype, weight, bias in zip(dtypes, parameters[::2], parameters[1::2], strict=True)
        )
        if finite is None:
            return outputs
        ctx.mark_non_differentiable(finite)
        return *outputs, finite

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        given, finite = masked(x) if ctx.masks else (x, None)
        flat = given.flatten(0, 1)  # [B, T, N] -> [B T, N]
        casts = {dtype: flat.to(dtype) for dtype in dict.fromkeys(ctx.dtypes)}
        found: list[Tensor | None] = []
        total: Tensor | None = None
        outputs = gradients[: len(ctx.dtypes)]  # the mask of finite tokens has none
        for dtype, gradient, weight, bias in zip(ctx.dtypes, outputs, parameters[::2], parameters[1::2], strict=True):
            gradient = gradient.flatten(0, 1)  # [B, T, M] -> [B T, M]
            found += [(gradient.t() @ casts[dtype]).to(weight.dtype), gradient.sum(0, dtype=bias.dtype)]
            back = (gradient @ weight.to(dtype)).to(x.dtype)  # [B T, N]
            total = back if total is None else total + back
        assert total is not None
        total = total.view_as(x)  # [B T, N] -> [B, T, N]
        if finite is not None:
            total = torch.where(finite.view(torch.bool)[..., None], total, 0)  # [B, T, 1] over [B, T, N]
        return total, None, None, *found
