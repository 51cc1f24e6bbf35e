"""What the kernels take of a GPU: registers, spilled bytes, shared memory, as they were compiled.

``resources.json`` is the record, of the kernels of training calls and of those of streamed steps. It is written by
``scripts/kernel_resources.py``, which compiles ``compilations``; a test compiles them again and compares. ``auto``
takes no kernels that spill more than ``LARGEST_SPILL`` or need more shared memory than a program can have.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moshi_ttt.plugins.hybrid.triton.compilations import (
    CONTINUED,
    KERNELS,
    SHAPES,
    STEP_SHAPES,
    Compilation,
    step_launches,
    training_kernels,
)
from moshi_ttt.plugins.hybrid.triton.train_settings import Products, Tile, tile_of, tiles_of

RECORD = Path(__file__).with_name("resources.json")
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


def training_row(
    arch: int, kernel: str, chunk: int, width: int, products: Products, *, continued: bool = False,
    tile: Tile | None = None,
) -> str:  # fmt: skip
    """The name of a row of the record, as in ``sm_90 linear_states C16 D128 tf32x3 continued``."""
    name = f"sm_{arch} {kernel} C{chunk} D{width} {products}"
    if tile not in (None, tile_of(chunk)):
        name += f" S{tile.slice_width} W{tile.warps}"
    return f"{name} continued" if continued else name


def step_row(arch: int, layers: int, launch: str, chunk: int, width: int) -> str:
    """The name of a row of the record, as in ``sm_90 step of 2 layers: keys C16 D128``."""
    return f"sm_{arch} step of {layers} layers: {launch} C{chunk} D{width}"


def compilations(products: Products = "tf32x3") -> dict[str, tuple[int, Compilation]]:
    """What is recorded, by the names of the rows: the architecture and what is compiled for it.

    Some of these rows are not recorded: of chains that ``auto`` does not take, some of whose kernels compile for
    minutes.
    """
    found = {}
    for arch in LARGEST_SPILL:
        for kind, shapes in SHAPES.items():
            for (chunk, width), continued in product(shapes, (False, True)):
                for tile in tiles_of(chunk) if kind != "around" else (tile_of(chunk),):
                    kernels = training_kernels(kind, chunk, width, products, continued=continued, tile=tile)
                    for kernel, made in kernels.items():
                        name = training_row(arch, kernel, chunk, width, products, continued=continued, tile=tile)
                        found[name] = (arch, made)
        for layers, chunk, width in STEP_SHAPES:
            for launch, made in step_launches(layers, chunk, width).items():
                found[step_row(arch, layers, launch, chunk, width)] = (arch, made)
    return found


def training_too_large(
    kind: str, chunk: int, width: int, products: Products, capability: tuple[int, int], tile: Tile | None = None
) -> str | None:
    """Why ``auto`` takes no kernels of a chain, as the end of a sentence; None where it may.

    Args:
        kind: ``linear``, ``mlp`` or ``around``.
        capability: the GPU's compute capability.
        tile: None: ``tile_of(chunk)``.
    """
    arch = 10 * capability[0]
    named = [
        (kernel, training_row(arch, kernel, chunk, width, products, continued=continued, tile=tile))
        for continued in (False, True)
        for kernel in KERNELS[kind]
        if not continued or kernel in CONTINUED
    ]
    return _too_large(named, f"chunk {chunk}, head width {width}, {products}", capability)


def step_too_large(layers: int, chunk: int, width: int, capability: tuple[int, int]) -> str | None:
    """Why ``auto`` takes no kernels for a step, as the end of a sentence; None where it may.

    Args:
        capability: the GPU's compute capability.
    """
    arch = 10 * capability[0]
    named = [(each, step_row(arch, layers, each, chunk, width)) for each in step_launches(layers, chunk, width)]
    return _too_large(named, f"chunk {chunk}, head width {width}", capability)


def _too_large(named: Iterable[tuple[str, str]], where: str, capability: tuple[int, int]) -> str | None:
    """``named``: kernels and their rows."""
    arch = 10 * capability[0]
    if arch not in LARGEST_SPILL:
        listed = ", ".join(f"sm_{each}" for each in LARGEST_SPILL)
        return f"the kernels were compiled for {listed}, and this GPU is sm_{capability[0]}{capability[1]}"
    found = []
    for kernel, row in named:
        if row not in recorded():
            return f"what {kernel} takes at {where} on sm_{arch} is not recorded"
        found.append((kernel, recorded()[row]))
    worst_first = sorted(found, key=lambda each: each[1].spilled, reverse=True)
    return next((reason for kernel, taken in worst_first if (reason := excess(kernel, taken, arch))), None)


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
