"""Second derivatives of a fast path whose operations have a right first one only.

The fast path stays as it is, and so does its first gradient, bit for bit. A gradient that will itself be differentiated
(``create_graph``) is taken of another function, with the same values, that can be differentiated any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_again(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], again: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """``outputs``, computed from ``inputs``, on the same storage, with a gradient that can be differentiated.

    Args:
        again: takes the inputs and gives outputs of the same shapes, by differentiable operations alone. It is called
            in a backward pass with ``create_graph``, and never otherwise.
    """
    return tuple(_Again.apply(again, len(outputs), *outputs, *inputs))  # type: ignore[no-untyped-call]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, again: Callable[..., Sequence[Tensor]], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.inputs = again, len(tensors) - count
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, None, *given, *(None for _ in range(ctx.inputs))
        # Views: an input may be a function of another one, and the gradient must not go from one to the other.
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        outputs = [output for output, gradient in zip(ctx.again(*inputs), given, strict=True) if gradient is not None]
        upstream = [gradient for gradient in given if gradient is not None]
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
        gradients = (next(found) if tensor.requires_grad else None for tensor in inputs)
        return None, None, *(None for _ in given), *gradients
