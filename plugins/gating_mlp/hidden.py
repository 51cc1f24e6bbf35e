"""The hidden activation of a gated MLP, ``silu(gate x) * up x``, with a backward pass that keeps gate and up alone.

torch keeps ``silu(gate)`` too, which is as large as the result, and joins the gradients of gate and up by a copy. The
results of both passes are bit for bit those of the operations one by one.

Shape legend: B streams, T tokens, D width, h hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core.gated_mlp import GatedMLP, activation, hidden, input_projections


def hidden_activation(mlp: GatedMLP, x: Tensor) -> Tensor:
    """``[B, T, h]``: ``activation(gate x) * up x`` of ``x [B, T, D]``, as ``core.gated_mlp.hidden`` gives it."""
    if not _is_silu(activation(mlp)) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return hidden(mlp, x)
    parts = tuple(projection(x) for projection in input_projections(mlp))
    if parts[0].dtype != parts[-1].dtype:
        product: Tensor = activation(mlp)(parts[0]) * parts[-1]
        return product
    made: Tensor = _SiluProduct.apply(*parts)  # type: ignore[no-untyped-call]
    return made


def _is_silu(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``function`` is silu and nothing else: no hook of the user's, and not in place."""
    if type(function) is not nn.SiLU:
        return function is F.silu
    hooks = function._forward_hooks, function._forward_pre_hooks, function._backward_hooks, function._backward_pre_hooks
    return not function.inplace and not any(hooks)


def _halves(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gate and up ``[B, T, h]``, of one product ``[B, T, 2 h]`` or of two."""
    if len(parts) == 2:
        return parts[0], parts[1]
    gate, up = parts[0].unflatten(-1, (2, -1)).unbind(-2)  # [B, T, 2 h] -> [B, T, 2, h] -> twice [B, T, h]
    return gate, up


class _SiluProduct(torch.autograd.Function):
    """Of gate and up, as one tensor or as two."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        gate, up = _halves(parts)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts: tuple[Tensor, ...] = ctx.saved_tensors
        if torch.is_grad_enabled():  # by operations that have a derivative
            gate, up = _halves(parts)
            learned = [part for part, needed in zip(parts, ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(F.silu(gate) * up, learned, grad, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        grads = tuple(torch.empty_like(part) for part in parts)
        (gate, up), (grad_gate, grad_up) = _halves(parts), _halves(grads)
        given = F.silu(gate)
        torch.mul(grad, given, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=given), gate, grad_input=grad_gate)
        return grads
