"""What Moshi compiles: nothing on a CPU, and on CUDA the same in a block as in the base model.

Moshi hands four functions to ``torch.compile``: RMSNorm, the gated MLP, its rotary embedding and a loss that nothing
here uses. Its layers turn that off for tensors that are not on CUDA, and its MLP while it trains. The norm after the
last layer is outside the layers, and is compiled for a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

from torch import Tensor, nn

from moshi_ttt.core.block import GatedMLP
from moshi_ttt.hosts.moshi.upstream import ActivationGating, LMModel, RMSNorm, compiling, gating


class EagerOnCPUNorm(RMSNorm):
    """Moshi's RMSNorm, compiled on CUDA alone."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]``, normalized."""
        return eager_on_cpu_call(super().forward, x)


def eager_on_cpu(model: LMModel) -> LMModel:
    """``model``, which compiles nothing where it computes on a CPU: there it costs 20 s, and needs a C++ compiler.

    Wherever the model is now: it may be on the meta device, or be moved.
    """
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = EagerOnCPUNorm
    return model


def eager_on_cpu_call(function: Callable[..., Tensor], x: Tensor, *given: Any) -> Tensor:
    """``function(x, *given)``, of ``x [B, T, D]``, as Moshi's layers compute: compiled on CUDA alone."""
    with nullcontext() if x.is_cuda else compiling.no_compile():
        return function(x, *given)


def compiled_output(mlp: GatedMLP, x: Tensor) -> Tensor | None:
    """``mlp(x)``, ``[B, T, D]``, where Moshi runs its gated MLP compiled, by the very call the base makes; else None.

    The compiled MLP keeps the activation in float32 where the operations one by one round it, so in bfloat16 its output
    is another one. A block at a feed-forward site adds to what the base computes.
    """
    assert isinstance(mlp, ActivationGating)
    wrapped = hasattr(gating.gating_forward_kernel, "__wrapped__")  # as Moshi was imported with compiling
    compiled = wrapped and not compiling._compile_disabled and not mlp.training and isinstance(mlp.linear_in, nn.Linear)
    return cast(Tensor, mlp(x)) if compiled else None
