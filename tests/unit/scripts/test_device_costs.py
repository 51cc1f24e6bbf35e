"""The table of docs/gpu.md is what the code costs: more is a regression, much less a table to write anew."""

from __future__ import annotations

import importlib.util

import pytest

from tests.programs import load_script

SLACK = 0.05
"""How far below the table a figure may be."""
QUICK = ("ttt_linear", "gating_mlp")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton here")


COSTS = load_script("device_costs")


def budget() -> dict[str, list[int]]:
    rows = COSTS.TABLE.rows()
    return {name: [int(figure.replace(",", "")) for figure in figures] for name, figures in rows.items()}


def test_the_table_has_every_block():
    assert list(budget()) == [COSTS.name(*block) for block in COSTS.BLOCKS]


def marks(block):
    slow = () if block[0] in QUICK or "backend" in block[1] else (pytest.mark.slow,)
    return (*slow, needs_triton) if "backend" in block[1] else slow


@needs_triton
@pytest.mark.parametrize("chunk", [16, 32])
def test_a_block_by_kernels_keeps_at_most_150_kib_a_token(chunk):
    kept = COSTS.row("ttt_mlp", {"chunk": chunk, "backend": {"train": "triton"}}, False)[3]
    assert kept <= 150


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=COSTS.name(*block), marks=marks(block)) for block in COSTS.BLOCKS]
)
def test_a_block_costs_what_the_table_says(block):
    allowed, found = budget()[COSTS.name(*block)], COSTS.row(*block)
    for what, most, figure in zip(COSTS.HEADINGS[1:], allowed, found, strict=True):
        assert figure <= most, f"{what}: {figure}, and docs/gpu.md allows {most}"
        assert figure >= (1 - SLACK) * most - 1, (
            f"{what}: {figure}, far below {most}: write the table of docs/gpu.md anew"
        )
