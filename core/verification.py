"""The contract between reference vectors and the code that is checked against them.

A variant registers verifiers; ``moshi-ttt verify`` reads a file of vectors, checks that it holds all that its operation
has, and runs every verifier that accepts it. The format of the files is described in ``docs/reference_vectors.md``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Kind = Literal["count", "number", "flag", "text"] | tuple[str, ...]
"""What a metadata value is: a whole number above 0, a number above 0, ``true`` or ``false``, text, or one of some."""
Shape = tuple[str | int, ...]
"""Dimensions by their names, which have one size in all tensors of a file; a number is that size, ``H*D`` a product."""


@dataclass(frozen=True, kw_only=True)
class VectorSchema:
    """What a file of one operation holds, and nothing else.

    Attributes:
        metadata: key -> what its value is; all are required, as are ``op`` and ``source``.
        inputs: name -> shape of ``in.NAME``. Each has its gradient ``grad.NAME``, but those in ``without_gradient``.
        outputs: name -> shape of ``out.NAME``; ``y`` is one of them, and ``in.cotangent`` is like it.
        sizes: sizes that the metadata give to dimensions.
        without_gradient: inputs whose gradient the file leaves out.
    """

    metadata: Mapping[str, Kind]
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    sizes: Mapping[str, int]
    without_gradient: frozenset[str] = frozenset()

    def tensors(self) -> dict[str, Shape]:
        """Name in the file -> shape."""
        gradients = {name: shape for name, shape in self.inputs.items() if name not in self.without_gradient}
        return {
            **{f"in.{name}": shape for name, shape in self.inputs.items()},
            "in.cotangent": self.outputs["y"],
            **{f"out.{name}": shape for name, shape in self.outputs.items()},
            **{f"grad.{name}": shape for name, shape in gradients.items()},
        }


class Verifier(ABC):
    """One way to compute an operation.

    Attributes:
        operation: the ``op`` of the files it is for.
        backend: the backend that computes, as the option ``backend`` names it; None where there is no such choice.
        builds: True where its code is built before it runs: it runs only where its backend is asked for.
        differentiable: False for forms that exist only without gradients (streaming).
        dtypes: those it computes in; the others are not compared.
    """

    operation: ClassVar[str]
    backend: ClassVar[str | None] = None
    builds: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32)

    @abstractmethod
    def metadata(self) -> Mapping[str, Kind]:
        """The metadata of the operation's files: see ``VectorSchema``."""

    @abstractmethod
    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        """The required contents of a file with this (complete) metadata; ``names`` are those of its tensors."""

    @abstractmethod
    def accepts(self, metadata: Mapping[str, str]) -> bool:
        """Whether this code computes the case that a file of the operation describes; its metadata are complete."""

    def takes(self, metadata: Mapping[str, str], names: frozenset[str]) -> bool:
        """``accepts``, for forms that some tensors decide about as well; ``names`` are those of the file."""
        return self.accepts(metadata)

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """The outputs by name (``y``, ``weight.0``, ...), differentiable with respect to ``inputs``."""

    @abstractmethod
    def tolerance(self, metadata: Mapping[str, str]) -> float:
        """Largest allowed float64 error max|a-b| / max(1, max|b|) of any output or gradient."""


def metadata_problems(expected: Mapping[str, Kind], metadata: Mapping[str, str]) -> list[str]:
    """A sentence for each metadata key that is missing, unknown, or has a value that it cannot have."""
    wanted: dict[str, Kind] = {"op": "text", "source": "text", **expected}
    problems = [f"metadata {key!r} is missing" for key in sorted(wanted.keys() - metadata.keys())]
    problems += [f"metadata {key!r} is unknown" for key in sorted(metadata.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & metadata.keys()):
        if not _is(wanted[key], metadata[key]):
            kind = wanted[key]
            allowed = " or ".join(kind) if isinstance(kind, tuple) else _ALLOWED[kind]
            problems.append(f"metadata {key!r} is {metadata[key]!r}, and must be {allowed}")
    return problems


def tensor_problems(schema: VectorSchema, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence for each tensor that is missing, unknown, not float64 and finite, or of a shape that does not fit."""
    expected, sizes = schema.tensors(), dict(schema.sizes)
    yield from (f"tensor {name!r} is missing" for name in sorted(expected.keys() - tensors.keys()))
    yield from (f"tensor {name!r} is unknown" for name in sorted(tensors.keys() - expected.keys()))
    for name in (name for name in expected if name in tensors):
        tensor, shape = tensors[name], expected[name]
        if str(tensor.dtype) != "torch.float64" or not bool(tensor.isfinite().all()):
            yield f"tensor {name!r} must be float64 and finite"
        if tensor.dim() != len(shape):
            yield f"tensor {name!r} has shape {list(tensor.shape)}, and must be {_shown(shape, sizes)}"
            continue
        fits = [_fits(part, size, sizes) for part, size in zip(shape, tensor.shape, strict=True)]
        if not all(fits):
            yield f"tensor {name!r} has shape {list(tensor.shape)}, and must be {_shown(shape, sizes)}"


def _fits(part: str | int, size: int, sizes: dict[str, int]) -> bool:
    """Whether a dimension has the size it must have; the one name in it that has no size yet gets one."""
    names = []
    for factor in str(part).split("*"):
        known = int(factor) if factor.isdecimal() else sizes.get(factor)
        if known is None:
            names.append(factor)
        elif known == 0 or size % known:
            return False
        else:
            size //= known
    if len(names) == 1:
        sizes[names[0]] = size
        return size > 0
    return size == 1


_ALLOWED = {
    "count": "a whole number of 1 or more", "number": "a number above 0", "flag": "true or false", "text": "some text",
}  # fmt: skip


def _is(kind: Kind, value: str) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind == "count":
        return value.isdecimal() and int(value) > 0
    if kind == "flag":
        return value in ("true", "false")
    if kind == "number":
        try:
            return 0 < float(value) < math.inf
        except ValueError:
            return False
    return bool(value.strip())


def _shown(shape: Shape, sizes: Mapping[str, int]) -> str:
    return "[" + ", ".join(
        str(part) if isinstance(part, int) or part not in sizes else f"{part}={sizes[part]}" for part in shape
    ) + "]"  # fmt: skip
