"""Guards of a streamed step, which writes its state in place: it has no gradient, and needs contiguous buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.call_checks import check_buffers
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.segments import stepped


class _Refused(torch.autograd.Function):
    """A copy of the first argument that depends on the others, and whose backward raises."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, message: str, *sources: Tensor) -> Tensor:
        ctx.message = message
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ContextError(ctx.message)


def refuse_gradient(y: Tensor, sources: Iterable[Tensor], message: str) -> Tensor:
    """``y``, computed without a graph, such that a gradient that would reach one of ``sources`` raises ContextError.

    Where no source requires a gradient none is lost, and ``y`` is returned as it is. So is it under ``torch.no_grad``.
    """
    needed = [source for source in sources if source.requires_grad] if torch.is_grad_enabled() else []
    if not needed:
        return y
    refused: Tensor = _Refused.apply(y, message, *needed)  # type: ignore[no-untyped-call]
    return refused


def streams(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the method ``step`` of a block: it runs without a graph, and on contiguous buffers only.

    A gradient that would be lost is refused in backward. It follows ``token_mask`` and ``starts`` of the context too
    (``segments.stepped``).
    """
    if getattr(step, "streams", False):
        return step

    @wraps(step)
    def without_graph(self: Any, x: Tensor, state: Any, context: Any = None) -> Tensor:
        check_buffers(self, state)
        if not torch.is_grad_enabled():
            return stepped(step, self, x, state, context)
        with torch.no_grad():
            y = stepped(step, self, x, state, context)
        return refuse_gradient(y, self.gradient_sources(x, state, context), self.no_gradient_in_streams())

    without_graph.streams = True  # type: ignore[attr-defined]  # a mark: a step is wrapped once
    return without_graph
