"""A launch of a training kernel as an operation of torch, so that a call also runs on tensors without values.

Each kernel is an operation of its own, and each launch is one call of it. So whatever counts operations counts
launches, and memory is allocated by torch's own operations, where it is seen as well. On tensors without values a
launch computes nothing.

Nothing is registered, and no kernel is imported, until the first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.device_log import LAUNCHES
from moshi_ttt.plugins.hybrid.triton.compilations import MODULES

NAME = f"{LAUNCHES}moshi_ttt_hybrid"
SCHEMA = (
    "(Tensor[] given, Tensor(a!)[] written, int[] grid, Scalar[] numbers, str[] names, Scalar[] constants, "
    "str precision, int warps) -> ()"
)
Constant = int | bool | float


def launch(
    kernel: str,
    grid: Sequence[int],
    given: Sequence[Tensor],
    written: Sequence[Tensor],
    numbers: Sequence[int | float],
    constants: Mapping[str, Any],
    warps: int,
) -> None:
    """Run a kernel once.

    Args:
        kernel: its name, one of those in ``compilations.MODULES``.
        grid: how many programs, in up to three dimensions.
        given, written: its tensors, in the order of its arguments; those of ``given`` are read only.
        numbers: the arguments after them.
        constants: the rest, by name: numbers, and ``PRECISION`` where it multiplies matrices.
        warps: of a program.
    """
    numeric = {name: value for name, value in constants.items() if name != "PRECISION"}
    precision = constants.get("PRECISION", "")
    operation = _operations()[kernel]
    operation(
        list(given), list(written), list(grid), list(numbers), list(numeric), list(numeric.values()), precision, warps
    )


@functools.cache
def _operations() -> _Launches:
    library = torch.library.Library(NAME, "DEF")
    found = {}
    for kernel in (name for kernels in MODULES.values() for name in kernels):
        library.define(f"{kernel}{SCHEMA}")
        for key in ("CPU", "CUDA"):
            library.impl(kernel, functools.partial(_run, kernel), key)
        torch.library.register_fake(f"{NAME}::{kernel}", _nothing, lib=library)
        found[kernel] = getattr(getattr(torch.ops, NAME), kernel).default
    return _Launches(library, found)


class _Launches:
    """The operations by their kernels' names; they exist as long as this does."""

    def __init__(self, library: torch.library.Library, found: Mapping[str, Any]) -> None:
        self._library, self._found = library, found

    def __getitem__(self, kernel: str) -> Any:
        return self._found[kernel]


def _run(
    kernel: str, given: list[Tensor], written: list[Tensor], grid: list[int], numbers: list[Any], names: list[str],
    constants: list[Constant], precision: str, warps: int,
) -> None:  # fmt: skip
    values: dict[str, Any] = dict(zip(names, constants, strict=True))
    if precision:
        values["PRECISION"] = precision
    with torch.cuda.device_of(written[0]):  # Triton launches on the current device
        _kernel(kernel)[tuple(grid)](*given, *written, *numbers, **values, num_warps=warps, num_stages=1)


def _nothing(*given: Any) -> None:
    """What a launch gives, beside what it writes to: no tensor."""


@functools.cache
def _kernel(name: str) -> Any:
    module = next(module for module, kernels in MODULES.items() if name in kernels)
    return getattr(import_module(f"moshi_ttt.plugins.hybrid.triton.{module}"), name)
