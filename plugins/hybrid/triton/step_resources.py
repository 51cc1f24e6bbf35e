"""What the kernels of a streamed step take of a GPU, as they were compiled: see ``resources``, whose rows these are.

``step_resources.json`` is the record, written by ``scripts/step_resources.py``; a test compiles them again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshi_ttt.plugins.hybrid.triton.resources import LARGEST_SPILL, Resources, excess
from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of, loop_block, slices_of

RECORD = Path(__file__).with_name("step_resources.json")
HEADS, EXPANSION = 32, 4
"""Of the blocks that are recorded: heads, and the width of hidden layers over that of a head."""


@dataclass(frozen=True)
class Compilation:
    """A kernel with the constants that one block gives it.

    Attributes:
        kernel: its name in ``step_kernels`` or ``step_surroundings``.
        constants: its constants, and None for arguments that a block leaves out.
        bfloat16: arguments in the host's dtype; other tensors are float32 or as ``scripts/step_resources.py`` has them.
    """

    kernel: str
    constants: Mapping[str, int | None]
    bfloat16: tuple[str, ...] = ()
    warps: int = field(default=4)


def compilations(layers: int, chunk: int, width: int) -> dict[str, Compilation]:
    """The launches of one step, by the names that the record has, of a fast network of 1, 2 or 3 layers."""
    hidden = EXPANSION * width
    heads = {"H": HEADS, "HEADS": block_of(HEADS), "C": chunk}
    shared = {**heads, "BC": loop_block(chunk), "D": width, "BD": block_of(width)}
    found = _around(chunk, width)
    if layers == 1:
        units, count = slices_of(width)
        keys = {"F": width, "S": units, "SLICES": count, "OUT": 1, "BO": 1, "LAYERS": 1}
        found["keys"] = Compilation("keys", {**shared, **keys, "NEXT_W": None, "NEXT_INPUT": None, "PART": None})
        found["queries"] = Compilation("linear_queries", {**shared, "S": units})
        last: dict[str, int | None] = {"BEFORE": 1, "BQ": 1, "LAYERS": 1, "AFFINITY_PART": None}
        return {**found, "outputs": Compilation("outputs", {**shared, **last})}
    units, count = slices_of(hidden)
    before = {"BEFORE": count, "BQ": block_of(count)}
    own = {"F": hidden, "S": units, "SLICES": count}
    outward = {"OUT": width, "BO": block_of(width)}
    inward = outward if layers == 2 else {"OUT": hidden, "BO": loop_block(hidden, 128)}
    nothing: dict[str, int | None] = {"QUERY_PART": None, "AFFINITY_PART": None, "BEFORE": 1, "BQ": 1}
    first = {**shared, **own, **inward, **nothing, "BP": block_of(count), "FIRST": True, "LOSS": layers == 2}
    found["keys"] = Compilation("keys", {**shared, **own, **inward, "LAYERS": layers})
    found["queries"] = Compilation("queries", first)
    if layers == 3:
        parts = {**own, "BP": block_of(count), **outward}
        found["more_keys"] = Compilation("more_keys", {**heads, **parts, "BEFORE": count})
        found["gradients"] = Compilation("gradients", {**heads, **parts, "LOSS": True})
        second = {**shared, **parts, **before, "FIRST": False, "LOSS": False}
        found["more_queries"] = Compilation("queries", second)
    return {**found, "outputs": Compilation("outputs", {**shared, **before, "LAYERS": layers})}


def _around(chunk: int, width: int) -> dict[str, Compilation]:
    channels = HEADS * width
    tokens = {"H": HEADS, "D": width, "BP": block_of(width // 2), "C": chunk, "BC": block_of(chunk), "GIVEN": None}
    wide = {"N": channels, "BN": min(4096, block_of(channels))}
    norm = {"N": channels, "BN": block_of(channels)}
    return {
        "prepare": Compilation("prepare", {**tokens, **wide}, bfloat16=("X", "Q", "K", "V")),
        "norm": Compilation("norm", norm, bfloat16=("TO",), warps=8 if channels >= 2048 else 4),
        "gate": Compilation("gate", {"N": channels, "BN": 1024, "ONE": False}, bfloat16=("X", "ADDED", "TO")),
    }


def row_name(arch: int, layers: int, launch: str, chunk: int, width: int) -> str:
    """The name of a row of the record, as in ``sm_90 step of 2 layers: keys C16 D128``."""
    return f"sm_{arch} step of {layers} layers: {launch} C{chunk} D{width}"


def too_large(layers: int, chunk: int, width: int, capability: tuple[int, int]) -> str | None:
    """Why ``auto`` takes no kernels for a step, as the end of a sentence; None where it may.

    Args:
        capability: the GPU's compute capability.
    """
    arch = 10 * capability[0]
    if arch not in LARGEST_SPILL:
        listed = ", ".join(f"sm_{each}" for each in LARGEST_SPILL)
        return f"the kernels were compiled for {listed}, and this GPU is sm_{capability[0]}{capability[1]}"
    for launch in compilations(layers, chunk, width):
        taken = recorded().get(row_name(arch, layers, launch, chunk, width))
        if taken is None:
            return f"what {launch} takes at chunk {chunk} and head width {width} on sm_{arch} is not recorded"
        if (reason := excess(launch, taken, arch)) is not None:
            return reason
    return None


@functools.cache
def recorded() -> Mapping[str, Resources]:
    """The record, by the names of its rows."""
    rows: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    return {name: Resources(**row) for name, row in rows.items()}
