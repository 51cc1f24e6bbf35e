"""What the blocks did during an answer: their figures over time, as JSON, as rows of a table, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moshi_ttt.hosts.moshi.slots import SiteStats
from moshi_ttt.system.report.figures import colors, heading, legend_outside, panels, save
from moshi_ttt.system.report.tables import show
from moshi_ttt.system.report.writer import number

FIGURES = ("inner_loss", "start_loss", "moved", "updates", "skipped")
"""Of each block, by the names of ``SiteStats``."""
MEMORY_HEADER = ("block", "inner loss", "at the learned start", "memory has moved", "updates", "skipped")


def memory_series(stats: Sequence[tuple[int, Sequence[SiteStats]]], frame_rate: float) -> dict[str, Any]:
    """The figures over time, ``seconds`` and by block; empty without blocks, or where nobody looked."""
    if not stats or not stats[0][1]:
        return {}
    blocks: dict[str, dict[str, Any]] = {}
    for _, sites in stats:
        for site in sites:
            block = blocks.setdefault(site.site, {"variant": site.variant, **{name: [] for name in FIGURES}})
            for name in FIGURES:
                value = getattr(site, name)
                block[name].append(number(value) if isinstance(value, float) else value)
    return {"seconds": [frames / frame_rate for frames, _ in stats], "blocks": blocks}


def memory_rows(series: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each block, with the columns of ``MEMORY_HEADER``: mean losses, and where the rest is at the end."""
    rows = []
    for site, block in series["blocks"].items():
        losses = [_mean(block[name]) for name in ("inner_loss", "start_loss")]
        counts = ["" if block[name][-1] is None else str(block[name][-1]) for name in ("updates", "skipped")]
        moved = block["moved"][-1]
        rows.append((f"{site} ({block['variant']})", *losses, "" if moved is None else show(moved), *counts))
    return rows


def plot_memory(path: Path, series: Mapping[str, Any], *, title: str) -> None:
    """Two panels over time: the inner loss beside that at the learned start, dashed; and how far the memory moved."""
    figure, (losses, moved) = panels(2, 1, width=9.5, height=6.0, sharex=True)
    for place, (site, block) in enumerate(series["blocks"].items()):
        look = colors(place)
        losses.plot(series["seconds"], _gaps(block["inner_loss"]), label=site, **look)
        losses.plot(series["seconds"], _gaps(block["start_loss"]), color=look["color"], linestyle="--", linewidth=1)
        moved.plot(series["seconds"], _gaps(block["moved"]), **look)
    heading(losses, f"{title}: inner loss; dashed: of the same frames at the learned start")
    heading(moved, "how far the memory has moved from its learned start")
    moved.set_xlabel("time in the recording (s)")
    losses.set_ylabel("inner loss")
    legend_outside(figure)
    save(figure, path)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return show(sum(known) / len(known)) if known else ""


def _gaps(values: Sequence[float | None]) -> list[float]:
    """NaN where there is no value: nothing is drawn there."""
    return [float("nan") if value is None else value for value in values]
