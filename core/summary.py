"""A plan as a line and as a table: what was injected where, and how large it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from moshi_ttt.core.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from moshi_ttt.core.injection import Plan, PlannedBlock


def describe(plan: Plan) -> str:
    """``NAME at layers.1.sequence, layers.3.sequence of host moshi, 1,234 parameters, 1.25 MiB of state a stream``.

    More than three sites of a variant are given as their number, the first and the last.
    """
    ordered = sorted(plan.blocks, key=lambda block: (block.variant.name, block.site))
    parts = [
        f"{name} at {_sites(list(group))}" for name, group in groupby(ordered, key=lambda block: block.variant.name)
    ]
    return (
        f"{'; '.join(parts) or 'no block'} of host {plan.host.name}, {plan.parameters:,} parameters, "
        f"{human_bytes(plan.state_bytes)} of state a stream"
    )


def _sites(blocks: Sequence[PlannedBlock]) -> str:
    if len(blocks) <= 3:
        return ", ".join(str(block.site) for block in blocks)
    return f"{len(blocks)} sites, {blocks[0].site} to {blocks[-1].site}"


def table(plan: Plan, base_parameters: int) -> Table:
    """One row per block: site, variant, parameters, state of one stream, chunk in tokens and in seconds.

    Where a terminal is too narrow, a cell is broken, and nothing is left out.

    Args:
        plan: what was or will be injected.
        base_parameters: of the model without blocks.
    """
    from rich.table import Table

    share = f" ({plan.parameters / base_parameters:.2%} of the base model's)" if base_parameters else ""
    made = Table(
        title=f"TTT blocks in host {plan.host.name}, precision policy {plan.policy.name}", title_justify="left",
        caption=f"base model: {base_parameters:,} parameters{share and f'; blocks: {plan.parameters:,}{share}'}",
        caption_justify="left", show_footer=True,
    )  # fmt: skip
    made.add_column("site", footer=f"{len(plan.blocks)} blocks", overflow="fold")
    made.add_column("variant", overflow="fold")
    made.add_column("parameters", footer=f"{plan.parameters:,}", justify="right", overflow="fold")
    made.add_column("state of\na stream", footer=human_bytes(plan.state_bytes), justify="right", overflow="fold")
    made.add_column("chunk,\ntokens", justify="right", overflow="fold")
    made.add_column("chunk,\nseconds", justify="right", overflow="fold")
    for block in plan.blocks:
        tokens, rate = block.chunk_tokens, block.info.frame_rate
        seconds = "-" if tokens is None or rate is None else f"{tokens / rate:,.2f}"
        made.add_row(
            str(block.site), block.variant.name, f"{block.parameters:,}", human_bytes(block.state_bytes),
            "-" if tokens is None else f"{tokens:,}", seconds,
        )  # fmt: skip
    return made
