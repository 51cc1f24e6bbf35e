"""A linear projection with bias: as tensors, and as the module that owns them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core.block import BlockContext

INIT_STD = 0.02
"""Standard deviation of initial weights that have no option of their own."""


@dataclass
class Linear:
    """Weight ``[out, in]`` and bias ``[out]``. Not frozen: torch.compile cannot trace a frozen one."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x W^T + b`` with inputs in ``dtype`` (products accumulate in float32, then round to ``dtype``)."""
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Projection(nn.Module):
    """Weight ``[out, in]`` and bias ``[out]`` as plain parameters.

    Not an ``nn.Linear``: tools that replace every linear layer (LoRA, quantization) must leave a block alone.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def tensors(self) -> Linear:
        """The parameters themselves."""
        return Linear(self.weight, self.bias)

    def inputs(self, context: BlockContext | None, dtype: torch.dtype) -> Linear:
        """The parameters for products in ``dtype``: while a host streams, the copies that the stream keeps."""
        if context is None or context.casts is None:
            return self.tensors()
        return Linear(context.cast(self.weight, dtype), context.cast(self.bias, dtype))
