"""What the training kernels take of a GPU: registers, spilled bytes, shared memory, as they were compiled.

``resources.json`` is the record, written by ``scripts/kernel_resources.py``; a test compiles them again and compares.
``auto`` takes no kernels that spill more than ``LARGEST_SPILL`` or need more shared memory than a program can have.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_ttt.plugins.hybrid.triton.train_settings import Products

RECORD = Path(__file__).with_name("resources.json")
MODULES: Mapping[str, tuple[str, ...]] = {
    "linear_kernels": (
        "linear_states", "linear_weights", "linear_outputs", "linear_output_gradients", "linear_state_gradients",
        "linear_key_gradients",
    ),
    "mlp_forward": ("mlp_first_keys", "mlp_chunk", "mlp_outputs", "mlp_outputs_again", "mlp_states"),
    "mlp_backward": (
        "mlp_output_gradients", "mlp_second_layer_gradients", "mlp_first_layer_gradients", "mlp_key_gradients",
        "mlp_token_gradients",
    ),
    "train_surroundings": (
        "token_mask", "tokens", "token_gradients", "post_norm", "norm_gradients", "gated", "gate_gradients",
    ),
}  # fmt: skip
"""The kernels of each module."""
KERNELS: Mapping[str, tuple[str, ...]] = {
    "linear": MODULES["linear_kernels"], "mlp": (*MODULES["mlp_forward"], *MODULES["mlp_backward"]),
    "around": MODULES["train_surroundings"],
}  # fmt: skip
"""The kernels of each chain, and those around the inner loop."""
LARGEST_SPILL = {80: 256, 90: 0, 100: 0}
"""Bytes a thread may spill, by the architecture that the kernels are compiled for."""
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program can have, by architecture (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        registers: of a thread. spilled: bytes that a thread keeps in local memory for want of registers.
        shared: bytes of shared memory of a program. warps: of a program.
    """

    registers: int
    spilled: int
    shared: int
    warps: int


def row_name(arch: int, kernel: str, chunk: int, width: int, products: Products) -> str:
    """The name of a row of the record, as in ``sm_90 linear_states C16 D128 tf32x3``."""
    return f"sm_{arch} {kernel} C{chunk} D{width} {products}"


def too_large(kind: str, chunk: int, width: int, products: Products, capability: tuple[int, int]) -> str | None:
    """Why ``auto`` takes no kernels of a chain, as the end of a sentence; None where it may.

    Args:
        kind: ``linear``, ``mlp`` or ``around``.
        capability: the GPU's compute capability.
    """
    arch = 10 * capability[0]
    if arch not in LARGEST_SPILL:
        return (
            f"the kernels were compiled for {_listed(LARGEST_SPILL)}, and this GPU is sm_{capability[0]}{capability[1]}"
        )
    taken = {kernel: recorded().get(row_name(arch, kernel, chunk, width, products)) for kernel in KERNELS[kind]}
    if missing := [kernel for kernel, found in taken.items() if found is None]:
        return f"what {missing[0]} takes at chunk {chunk}, head width {width}, {products} on sm_{arch} is not recorded"
    found = {kernel: each for kernel, each in taken.items() if each is not None}
    worst_first = sorted(found, key=lambda kernel: found[kernel].spilled, reverse=True)
    return next((reason for kernel in worst_first if (reason := excess(kernel, found[kernel], arch))), None)


def excess(kernel: str, taken: Resources, arch: int) -> str | None:
    """Why ``auto`` takes no kernel that takes so much, as the end of a sentence; None where it may."""
    if taken.spilled > LARGEST_SPILL[arch]:
        return (
            f"{kernel} spills {taken.spilled} bytes a thread on sm_{arch}, and auto takes kernels that spill at most "
            f"{LARGEST_SPILL[arch]}"
        )
    if taken.shared > SHARED_MEMORY[arch]:
        return f"{kernel} needs {taken.shared} bytes of shared memory, and sm_{arch} has {SHARED_MEMORY[arch]}"
    return None


@functools.cache
def recorded() -> Mapping[str, Resources]:
    """The record, by the names of its rows."""
    rows: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    return {name: Resources(**row) for name, row in rows.items()}


def _listed(archs: Mapping[int, object]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)
