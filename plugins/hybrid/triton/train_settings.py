"""How a training kernel is to run: what is no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Products = Literal["ieee", "tf32x3", "bf16x3", "tf32", "bf16", "bf16_interpreted"]
"""How matrices are multiplied: in float32, as three products of tf32 or bfloat16 parts, or in tf32 or bfloat16.

Sums are float32 with each of them. ``bf16_interpreted`` gives what ``bf16`` does in Triton's interpreter, whose own
products of bfloat16 are of other numbers.
"""


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
