"""Refuse a second derivative where the operations would compute a wrong one, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def once_differentiable(tensor: Tensor, reason: str) -> Tensor:
    """``tensor`` on the same storage; a gradient of it that is to be differentiated again raises RuntimeError.

    Raised by the first backward pass, the one with ``create_graph``: ``torch.autograd.grad`` of that gradient may never
    reach a place that only raises when it is differentiated.

    Args:
        reason: the start of the message, a clause without a full stop.
    """
    return _Once.apply(tensor, reason) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.reason}, and has no second derivatives: its gradient cannot be taken with create_graph=True. "
                "Leave it uncompiled (compile: false) where a gradient is differentiated again."
            )
        return gradient, None
