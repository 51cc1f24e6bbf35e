"""The kernels, and with which constants and types they are compiled for the record of what they take of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of, loop_block, slices_of
from moshi_ttt.plugins.hybrid.triton.train_settings import EACH, GATED, Products, Tile, settings_of

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
"""The kernels of training calls, by their modules."""
KERNELS: Mapping[str, tuple[str, ...]] = {
    "linear": MODULES["linear_kernels"], "mlp": (*MODULES["mlp_forward"], *MODULES["mlp_backward"]),
    "around": MODULES["train_surroundings"],
}  # fmt: skip
"""The kernels of each chain, and those around the inner loop."""
CONTINUED = frozenset({
    "linear_states", "linear_state_gradients", "mlp_chunk", "mlp_states", "mlp_second_layer_gradients",
    "mlp_first_layer_gradients", "mlp_key_gradients",
})  # fmt: skip
"""Kernels that are other code in a call that continues a state (``GIVEN``)."""
SHAPES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "linear": ((16, 64), (16, 128), (32, 64), (32, 128)), "mlp": ((16, 64), (16, 128)), "around": ((16, 64), (16, 128)),
}  # fmt: skip
"""Chunk sizes and head widths of each chain: those that ``auto`` may take. What is around takes as much with every
chunk."""
STEP_SHAPES = tuple(product((1, 2, 3), (16, 32), (64, 128)))
"""Layers of the fast network, chunk sizes and head widths, of streamed steps."""
CHANNELS = 4096
"""Of the host: those of Moshi 7B."""
HEADS, EXPANSION = 32, 4
"""Of the blocks whose steps are recorded: heads, and the width of hidden layers over that of a head."""
TRAINING_TYPES = {
    "FINITE": "*u8", "OK": "*u8", "UPDATED": "*u8", "POSITION": "*i64",
    **dict.fromkeys(("T", "H", "N", "BH", "CHUNK", "FIRST", "LAST", "SLOTS", "COUNT"), "i32"),
}  # fmt: skip
STEP_TYPES = {
    "OK": "*i32", "NOW": "*i32", "ACTIVE": "*i1", "UPDATED": "*i1", "POSITION": "*i64", "SPOILED": "*i64",
    "SKIPPED": "*i64",
}  # fmt: skip
"""Of arguments that are no tensors of float32, and no numbers of it (``FLOATS``)."""
FLOATS = dict.fromkeys(("eps", "limit", "base_rate", "factor", "log2_theta", "volume"), "fp32")


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A kernel with the constants that one block gives it.

    Attributes:
        module: of this folder. kernel: its name there.
        constants: by the names of its arguments, among others; None for arguments that a block leaves out.
        types: of its other arguments, where they are not tensors of float32.
        warps: of a program.
    """

    module: str
    kernel: str
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    warps: int = 4


def training_kernels(
    kind: str, chunk: int, width: int, products: Products, *, continued: bool = False, tile: Tile | None = None
) -> dict[str, Compilation]:
    """The kernels of a chain; of ``continued`` calls, those that are other code then.

    Those ``around`` the inner loop are compiled for such a call alone, in which they do more.
    """
    settings = settings_of(chunk, 1e-6, products, tile=tile)
    constants = {
        "C": chunk, "D": width, "S": settings.slice_width, "EVERY": settings.every, "PRECISION": settings.precision,
        "SLICES": EXPANSION * width // settings.slice_width, "CAUSAL": True, "GIVEN": continued,
    }  # fmt: skip
    found = {}
    for kernel in KERNELS[kind]:
        if not continued or kernel in CONTINUED:
            module = next(module for module, kernels in MODULES.items() if kernel in kernels)
            more = _of_surroundings(kernel, width) if kind == "around" else {}
            found[kernel] = Compilation(
                module=module, kernel=kernel, constants=constants | more, types={**TRAINING_TYPES, **FLOATS},
                warps=settings.warps,
            )  # fmt: skip
    return found


def _of_surroundings(kernel: str, width: int) -> dict[str, Any]:
    heads = CHANNELS // width
    return {
        "H": heads, "BH": heads, "EACH": EACH, "BT": 1, "ALL": True, "CONTINUED": True, "N": CHANNELS, "ONE": False,
        "BY_ROW": False, "BN": GATED if "gate" in kernel else CHANNELS,
    }  # fmt: skip


def step_launches(layers: int, chunk: int, width: int) -> dict[str, Compilation]:
    """The launches of one step, by the names that the record has, of a fast network of 1, 2 or 3 layers."""
    hidden = EXPANSION * width
    heads = {"H": HEADS, "HEADS": block_of(HEADS), "C": chunk}
    shared = {**heads, "BC": loop_block(chunk), "D": width, "BD": block_of(width)}
    found = _around_a_step(chunk, width)
    if layers == 1:
        units, count = slices_of(width)
        keys = {"F": width, "S": units, "SLICES": count, "OUT": 1, "BO": 1, "LAYERS": 1}
        found["keys"] = _of_step("keys", {**shared, **keys, "NEXT_W": None, "NEXT_INPUT": None, "PART": None})
        found["queries"] = _of_step("linear_queries", {**shared, "S": units})
        last = {"BEFORE": 1, "BQ": 1, "LAYERS": 1, "AFFINITY_PART": None}
        return {**found, "outputs": _of_step("outputs", {**shared, **last})}
    units, count = slices_of(hidden)
    before = {"BEFORE": count, "BQ": block_of(count)}
    own = {"F": hidden, "S": units, "SLICES": count}
    outward = {"OUT": width, "BO": block_of(width)}
    inward = outward if layers == 2 else {"OUT": hidden, "BO": loop_block(hidden, 128)}
    nothing = {"QUERY_PART": None, "AFFINITY_PART": None, "BEFORE": 1, "BQ": 1}
    first = {**shared, **own, **inward, **nothing, "BP": block_of(count), "FIRST": True, "LOSS": layers == 2}
    found["keys"] = _of_step("keys", {**shared, **own, **inward, "LAYERS": layers})
    found["queries"] = _of_step("queries", first)
    if layers == 3:
        parts = {**own, "BP": block_of(count), **outward}
        found["more_keys"] = _of_step("more_keys", {**heads, **parts, "BEFORE": count})
        found["gradients"] = _of_step("gradients", {**heads, **parts, "LOSS": True})
        second = {**shared, **parts, **before, "FIRST": False, "LOSS": False}
        found["more_queries"] = _of_step("queries", second)
    return {**found, "outputs": _of_step("outputs", {**shared, **before, "LAYERS": layers})}


def _around_a_step(chunk: int, width: int) -> dict[str, Compilation]:
    channels, module = HEADS * width, "step_surroundings"
    tokens = {"H": HEADS, "D": width, "BP": block_of(width // 2), "C": chunk, "BC": block_of(chunk), "GIVEN": None}
    wide = {"N": channels, "BN": min(4096, block_of(channels))}
    norm, gate = {"N": channels, "BN": block_of(channels)}, {"N": channels, "BN": 1024, "ONE": False}
    return {
        "prepare": _of_step("prepare", {**tokens, **wide}, ("X", "Q", "K", "V"), module),
        "norm": _of_step("norm", norm, ("TO",), module, warps=8 if channels >= 2048 else 4),
        "gate": _of_step("gate", gate, ("X", "ADDED", "TO"), module),
    }


def _of_step(
    kernel: str, constants: Mapping[str, Any], bfloat16: tuple[str, ...] = (), module: str = "step_kernels",
    warps: int = 4,
) -> Compilation:  # fmt: skip
    """``bfloat16``: arguments in the host's dtype."""
    types = {**STEP_TYPES, **FLOATS, **dict.fromkeys(bfloat16, "*bf16")}
    return Compilation(module=module, kernel=kernel, constants=constants, types=types, warps=warps)
