"""How a training kernel is to run: what is no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Products = Literal["ieee", "tf32x3", "bf16x3", "tf32", "bf16", "bf16_interpreted"]
"""How matrices are multiplied: in float32, as three products of tf32 or bfloat16 parts, or in tf32 or bfloat16.

Sums are float32 with each of them. ``bf16_interpreted`` gives what ``bf16`` does in Triton's interpreter, whose own
products of bfloat16 are of other numbers.
"""


SLICE = 32
"""Rows of W in one product of TTT-Linear, and the most hidden units of TTT-MLP that one program has, at chunk 16; half
of that at larger ones."""
GROUP = 320
"""Tokens between two of which the fast weights are kept for the backward pass, without ``checkpoint_chunks``.

With heads of 128 and a hidden width of 512 the fast weights of a row are as large as 1,024 tokens in float32. The more
tokens a group has, the less is kept, and the more is alive while the backward pass goes through a group.
"""
PARTS = 160
"""Tokens of which TTT-MLP's slices hold their parts of outputs, or of gradients, at a time."""
EACH = 16
"""Tokens of a program that adds up gradients of parameters."""
GATED = 1024
"""Channels of a program of the gate."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a chain of training kernels needs beside its tensors.

    Attributes:
        chunk: C, tokens a chunk.
        eps: of the inner LayerNorm.
        causal: False lets every query of a chunk use all of the chunk's keys.
        precision: of products of matrices.
        every: chunks a group. The fast weights at the start of each group are kept for the backward pass.
        parts: of TTT-MLP, chunks whose slices' parts of a sum are alive together.
        slice_width: of TTT-MLP, hidden units that one program has; of TTT-Linear, rows of W in one product.
        warps: warps a program.
        given: tokens whose rate is below 0 are from before the call: their values are gradients (``key_gradient``).
    """

    chunk: int
    eps: float
    causal: bool = True
    precision: Products = "ieee"
    every: int = 4
    parts: int = 4
    slice_width: int = 32
    warps: int = 8
    given: bool = False


@dataclass(frozen=True)
class Tile:
    """How much of a chain's work one program has at a time: ``slice_width`` and ``warps`` of ``TrainSettings``."""

    slice_width: int
    warps: int = 8


def tile_of(chunk: int) -> Tile:
    """The tile of chunks of so many tokens, where none has been measured to be faster."""
    return Tile(SLICE if chunk == 16 else SLICE // 2)


def tiles_of(chunk: int) -> tuple[Tile, ...]:
    """Tiles to choose from by measuring: that of ``tile_of`` first."""
    first = tile_of(chunk)
    return first, Tile(SLICE // 2 if chunk == 16 else SLICE), Tile(first.slice_width, warps=4)


def settings_of(
    chunk: int, eps: float, products: Products, causal: bool = True, together: int | None = None,
    tile: Tile | None = None,
) -> TrainSettings:  # fmt: skip
    """How the kernels run, here and in the record of what they take."""
    tile = tile or tile_of(chunk)
    return TrainSettings(
        chunk=chunk, eps=eps, causal=causal, precision=products, every=together or max(1, GROUP // chunk),
        parts=max(1, PARTS // chunk),
        slice_width=tile.slice_width, warps=tile.warps,
    )  # fmt: skip
