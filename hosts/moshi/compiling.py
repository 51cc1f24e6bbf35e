"""What Moshi compiles: nothing where it computes on a CPU, and the same in a block as in the base on CUDA.

Moshi hands four functions to ``torch.compile``: RMSNorm, the gated MLP, its rotary embedding and a loss that nothing
here uses. Its layers turn that off for tensors that are not on CUDA, and its MLP while it trains. The norm after the
last layer is outside the layers, and is compiled for a CPU too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn

from moshi_ttt.hosts.moshi import upstream
from moshi_ttt.hosts.moshi.upstream import ActivationGating, LMModel, RMSNorm


class EagerOnCPUNorm(RMSNorm):
    """Moshi's RMSNorm, compiled on CUDA alone."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]``, normalised."""
        with nullcontext() if x.is_cuda else upstream.no_compile():
            return cast(Tensor, super().forward(x))


def eager_on_cpu(model: LMModel) -> LMModel:
    """``model``, which compiles nothing where it computes on a CPU: there it costs 20 s, and needs a C++ compiler.

    Wherever the model is now: it may be on the meta device, or be moved.
    """
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = EagerOnCPUNorm
    return model
