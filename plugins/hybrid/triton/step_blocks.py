"""Block sizes of the kernels of a streamed step: powers of two, from the sizes of a layer."""

from __future__ import annotations

MOST_SLICES = 16
SMALLEST_SLICE = 32
"""Units: 128 bytes of float32, a line of the cache."""


def block_of(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def loop_block(size: int, most: int = 32) -> int:
    """How many of ``size`` a program takes at a time: a power of two, ``most`` or less."""
    return min(most, block_of(size))


def slices_of(width: int) -> tuple[int, int]:
    """Units of one slice of a layer's output, and the number of slices.

    Neither depends on the number of rows, so a row's sums do not either.
    """
    units = max(SMALLEST_SLICE, block_of(-(-width // MOST_SLICES)))
    return units, -(-width // units)
