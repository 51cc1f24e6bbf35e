"""Which whole numbers a block's state can hold: checked where a state comes from outside, such as a file.

A number that no stream has (a position beyond its chunk, a negative count) may raise in a later step, for every row of
the batch. So a state is checked before anything of it is written.

Shape legend: B streams (rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

LARGEST_COUNT = 2**48
"""Of what is only counted: 700,000 years of Moshi's frames. Sums of two stay far from the end of int64."""


@dataclass(frozen=True)
class StateRange:
    """The whole numbers from ``least`` to ``most``, both included.

    Attributes:
        up_to: another entry of the state that this one never exceeds, row by row.
    """

    least: int = 0
    most: int = LARGEST_COUNT
    up_to: str | None = None


def counters(state: Mapping[str, Tensor]) -> dict[str, StateRange]:
    """A range from 0 to ``LARGEST_COUNT`` for every entry of whole numbers."""
    return {name: StateRange() for name, tensor in state.items() if is_whole(tensor)}


def is_whole(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds whole numbers: no floating point, no truth values."""
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype.is_signed


def range_problems(ranges: Mapping[str, StateRange], state: Mapping[str, Tensor]) -> Iterator[str]:
    """A sentence for each entry of ``state``, ``[B, ...]`` each, that leaves its range. Reads values on the CPU."""
    for name, allowed in ranges.items():
        if name not in state:
            continue
        given = state[name]
        least, most = int(given.min()), int(given.max())
        if least < allowed.least or most > allowed.most:
            wrong = least if least < allowed.least else most
            yield f"{name} is {wrong}, and {allowed.least} to {allowed.most} are allowed"
        elif (bound := state.get(allowed.up_to or "")) is not None and bool((beyond := given > bound).any()):
            yield f"{name} is {int(given[beyond].max())}, and no more than {allowed.up_to} is allowed"
