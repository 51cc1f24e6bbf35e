"""What a block of each variant costs on an accelerator at Moshi's size, counted without one: a table for docs/gpu.md.

    python scripts/device_costs.py            # prints the table
    python scripts/device_costs.py --write    # writes it into docs/gpu.md

Counted are launches and bytes of one block, on tensors without values (``moshi_ttt.core.device_log``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from table_in_page import TableInPage, markdown, print_or_write
from torch import nn

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase, DeviceCost, Shape, device_cost

TABLE = TableInPage("device costs", "device_costs.py")
DIM, HEADS, HIDDEN, BATCH, TOKENS = 4096, 32, 11_264, 2, 1250
"""Of Moshi's 7B: width, heads, hidden width of its gated MLP; streams, and tokens of 100 seconds."""

BLOCKS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("ttt_linear", {"chunk": 32}, False),
    ("ttt_linear", {"chunk": 32, "checkpoint_chunks": 4}, False),
    ("ttt_mlp", {"chunk": 16}, False),
    ("ttt_mlp", {"chunk": 32}, False),
    ("ttt_mlp", {"chunk": 64}, False),
    ("ttt_mlp", {"chunk": 32, "checkpoint_chunks": 4}, False),
    ("ttt_mlp", {"chunk": 32}, True),
    ("ttt_linear", {"chunk": 32, "backend": {"train": "triton"}}, False),
    ("ttt_mlp", {"chunk": 16, "backend": {"train": "triton"}}, False),
    ("ttt_mlp", {"chunk": 32, "backend": {"train": "triton"}}, False),
    ("ttt_mlp", {"chunk": 16, "backend": {"train": "triton"}}, True),
    ("ttt_mlp", {"chunk": 32, "backend": {"train": "triton"}}, True),
    ("ttt_multilayer", {"chunk": 32}, False),
    ("ttt_ridge", {"chunk": 16}, False),
    ("ttt_ridge", {"chunk": 16, "checkpoint_chunks": 8}, False),
    ("ttt_ridge", {"chunk": 16}, True),
    ("gating_mlp", {"chunk": 256}, False),
    ("gating_mlp", {"chunk": 256}, True),
    ("gating_mlp", {"chunk": 256, "clip": 1.0, "decay": 0.1, "learned_lr": True}, False),
    ("gating_mlp", {"chunk": 256, "update": "ridge", "keys": "unit"}, False),
)
"""Variant, options, and whether the call continues a state and gives the one after it."""


class MoshiMLP(nn.Module):
    """A gated MLP of Moshi's size, without values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_in = nn.Linear(DIM, 2 * HIDDEN, bias=False, device="meta", dtype=dtype)
        self.linear_out = nn.Linear(HIDDEN, DIM, bias=False, device="meta", dtype=dtype)
        self.activation = nn.functional.silu
        self.requires_grad_(False)


def cost(variant: str, options: dict[str, Any], carried: bool) -> DeviceCost:
    registry = default_registry()
    config = parse_block({"variant": variant, **options}, registry=registry)
    case = BlockCase(
        variant=variant, config=config, dtype=torch.bfloat16, shape=Shape(dim=DIM, heads=HEADS, batch=BATCH)
    )
    info = case.info("meta")
    if info.mlp is not None:
        info = replace(info, mlp=MoshiMLP(case.dtype))
    block = registry.block(variant).factory(config, info, case.policy.roles(case.dtype))
    return device_cost(block, batch=BATCH, tokens=TOKENS, carried=carried)


def name(variant: str, options: dict[str, Any], carried: bool) -> str:
    listed = ", ".join("triton" if key == "backend" else f"{key} {value}" for key, value in options.items())
    return f"{variant}, {listed}{', carried' if carried else ''}"


HEADINGS = (
    "block", "launches: forward", "backward", "a streamed step", "kept for backward, KiB a token", "peak, MiB",
)  # fmt: skip


def row(variant: str, options: dict[str, Any], carried: bool) -> list[int]:
    """The figures of one block, as ``HEADINGS`` names them."""
    found = cost(variant, options, carried)
    kept, peak = found.kept_bytes / 1024 / (BATCH * TOKENS), found.peak_bytes / 2**20
    return [found.forward, found.backward, found.step, round(kept), round(peak)]


def table() -> str:
    return markdown(HEADINGS, [(name(*block), *(f"{figure:,}" for figure in row(*block))) for block in BLOCKS])


if __name__ == "__main__":
    print_or_write(TABLE, table, __doc__)
