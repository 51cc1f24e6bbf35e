"""The inner loss of the fast network's output, and what a query's output is.

Two forms. ``InnerNorm``, the published one (arXiv:2407.04620): a LayerNorm at the network's end, the target v - k, and
the output q + LN(f(q)). ``PlainLoss``, without it: the target is v, and the output is f(q).

Shape legend: B streams, H heads, C tokens, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


class Objective(ABC):
    """The inner loss 1/2 || prediction(z) - target ||^2 of a network's output z ``[B, H, C, D]``."""

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """The prediction ``[B, H, C, D]``, of the network's output ``z``."""

    @abstractmethod
    def target(self, v: Tensor, k: Tensor) -> Tensor:
        """The target ``[..., D]`` of a key ``k`` and its value ``v``, both ``[..., D]``."""

    @abstractmethod
    def output(self, q: Tensor, z: Tensor) -> Tensor:
        """The output ``[B, H, C, D]`` of a query ``q``, for which the network gives ``z``."""

    @abstractmethod
    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """d/dz of the loss, for ``z`` and ``target`` ``[B, H, C, D]``."""

    bounded: ClassVar[bool]
    """Whether the loss's gradient is bounded whatever z and the target are, so that updates cannot diverge."""

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """The tensors that a gradient may be taken of."""
        return ()


@dataclass
class InnerNorm(Objective):
    """The LayerNorm inside the loss and the output: ``weight`` and ``bias [H, D]``, and its eps.

    Attributes:
        exact: write the loss's gradient out. torch's own operation for it has a right first derivative and a wrong
            second one: that takes the mean and the standard deviation for constants.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    exact: bool = False
    bounded: ClassVar[bool] = True

    def __call__(self, z: Tensor) -> Tensor:
        """``z [B, H, C, D]`` normalized over D, then scaled per head."""
        # [H, D] -> [H, 1, D]
        return F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]

    def target(self, v: Tensor, k: Tensor) -> Tensor:
        return v - k

    def output(self, q: Tensor, z: Tensor) -> Tensor:
        return q + self(z)

    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """d/dz of 1/2 * || LN(z) - target ||^2, for ``z`` and ``target`` ``[B, H, C, D]``."""
        if self.exact:
            return self._loss_gradient_written_out(z, target)
        shape = z.shape[-1:]
        normal, mean, rstd = torch.native_layer_norm(z, shape, None, None, self.eps)
        error = normal * self.weight[:, None] + self.bias[:, None] - target
        mask = [True, False, False]
        scaled = error * self.weight[:, None]  # [H, 1, D] over [B, H, C, D]
        gradient: Tensor = torch.ops.aten.native_layer_norm_backward(scaled, z, shape, mean, rstd, None, None, mask)[0]
        return gradient

    def _loss_gradient_written_out(self, z: Tensor, target: Tensor) -> Tensor:
        """With n = (z - mean) r, r = 1 / sqrt(var + eps) and u = weight (LN(z) - target): r (u - m(u) - n m(u n)).

        m is the mean over D; half-precision numbers are computed with in float32, as torch's operation does.
        """
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        centered = wide - wide.mean(-1, keepdim=True)
        r = (centered.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        n = centered * r
        u = (n * self.weight[:, None] + self.bias[:, None] - target) * self.weight[:, None]
        return (r * (u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True))).to(z.dtype)

    @property
    def learned(self) -> tuple[Tensor, ...]:
        return self.weight, self.bias


class PlainLoss(Objective):
    """1/2 || z - v ||^2: no LayerNorm, nothing learned, and the output is f(q)."""

    bounded: ClassVar[bool] = False

    def __call__(self, z: Tensor) -> Tensor:
        return z

    def target(self, v: Tensor, k: Tensor) -> Tensor:
        return v

    def output(self, q: Tensor, z: Tensor) -> Tensor:
        return z

    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        return z - target
