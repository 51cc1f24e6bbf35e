"""The contract between reference vectors and the code that is checked against them.

A variant registers verifiers; ``moshi-ttt verify`` reads a file of vectors and runs every verifier that accepts it.
The format of the files is described in ``docs/reference_vectors.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor


class Verifier(ABC):
    """One way to compute an operation.

    Attributes:
        differentiable: False for forms that exist only without gradients (streaming).
    """

    differentiable: ClassVar[bool] = True

    @abstractmethod
    def accepts(self, metadata: Mapping[str, str]) -> bool:
        """Whether this code computes the operation that a file with this metadata describes."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """The outputs by name (``y``, ``weight.0``, ...), differentiable with respect to ``inputs``."""

    @abstractmethod
    def tolerance(self, metadata: Mapping[str, str]) -> float:
        """Largest allowed float64 error max|a-b| / max(1, max|b|) of any output or gradient."""
