"""The contract of a host's losses: named sums over a batch, which add up over rows, micro-batches and ranks.

A loss is a sum of weighted terms (a term is one prediction: a token, a sample) divided by the sum of their weights. The
weights follow from the inputs alone, so their sum over the whole global batch is known before the first forward pass,
and each micro-batch divides by it: gradients do not depend on how rows are spread over micro-batches and ranks.

Shape legend: B rows, T positions, n losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moshi_ttt.core.errors import HostError


class HostLosses(ABC):
    """What a host's model minimizes. ``host.losses(...)`` makes it; it holds no tensor and no model.

    Attributes:
        names: of the n losses, such as ``("text", "audio")``.
        coefficients: what each counts in the total that is minimized.
        in_nats: whether a term is a negative log-likelihood in nats, so that its mean has a perplexity.
    """

    names: ClassVar[tuple[str, ...]]
    in_nats: ClassVar[bool] = True

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (1.0,) * len(self.names)

    @abstractmethod
    def weights(self, model: Any, inputs: Any) -> Tensor:
        """``[2, n]`` float64: the sum of the weights of each loss's terms, and how many terms have a weight above 0.

        From the inputs alone: no forward pass. ``inputs`` is what the host's batches give (``core.batches.Batch``).
        """

    @abstractmethod
    def sums(self, model: Any, inputs: Any) -> Tensor:
        """``[2, n]`` float32 of one forward pass: the sum of each loss's weighted terms, which is differentiable, and
        the plain sum of the terms that have a weight above 0, which is detached.
        """

    def total(self, model: Any, inputs: Any) -> Tensor:
        """The scalar loss of one batch on its own, differentiable."""
        return total_loss(self, self.sums(model, inputs), self.weights(model, inputs))

    def by_position(self, model: Any, inputs: Any) -> dict[str, Tensor]:
        """Name -> ``[B, T]`` float64 on the CPU: the mean of the terms at each position, NaN where there is none.

        Without weights and without gradients. Raises HostError where a host has no positions to report.
        """
        raise HostError(f"{type(self).__name__} gives no losses by position. Implement HostLosses.by_position.")


@dataclass(frozen=True, kw_only=True)
class LossMeans:
    """Losses over a set of terms, by name.

    Attributes:
        means: weighted means, as they are minimized.
        plain: plain means; NaN where there was no term. In nats a term where ``in_nats``.
        total: what is minimized: the sum of coefficient times mean.
        terms: how many predictions there were.
        in_nats: see ``HostLosses``.
    """

    means: Mapping[str, float]
    plain: Mapping[str, float]
    total: float
    terms: int
    in_nats: bool

    @classmethod
    def of(cls, losses: HostLosses, sums: Tensor, weights: Tensor) -> LossMeans:
        """From ``sums [2, n]`` and ``weights [2, n]``, added up over micro-batches and ranks."""
        weighted, plain = (row.tolist() for row in sums)
        weight, terms = (row.tolist() for row in weights)
        means = [part / each if each else 0.0 for part, each in zip(weighted, weight, strict=True)]
        return cls(
            means=dict(zip(losses.names, means, strict=True)),
            plain={
                name: part / count if count else math.nan
                for name, part, count in zip(losses.names, plain, terms, strict=True)
            },
            total=sum(factor * mean for factor, mean in zip(losses.coefficients, means, strict=True)),
            terms=int(sum(terms)),
            in_nats=losses.in_nats,
        )


def total_loss(losses: HostLosses, sums: Tensor, weights: Tensor) -> Tensor:
    """The scalar to differentiate: of ``sums [2, n]``, divided by the weights ``[2, n]`` of the whole global batch."""
    divisors = weights[0].clamp(min=torch.finfo(torch.float32).tiny).to(sums.device, torch.float32)
    return (sums[0] / divisors * sums.new_tensor(losses.coefficients)).sum()
