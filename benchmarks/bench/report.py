"""The results of a run as JSON, a table, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.check import Setting
from bench.measure import Gate, Measured, Spread
from moshi_ttt.system.report.figures import BLUE, colors, interval_bar, legend_outside, name_rows, panels, rule, save
from moshi_ttt.system.report.tables import image, show_interval, table, version_text
from moshi_ttt.system.report.writer import versions, write_report

RATIOS, SCALING = "ratios.png", "scaling.png"


def write(folder: Path, setting: Setting, gates: Sequence[Gate], results: Sequence[Measured]) -> None:
    """``metrics.json``, ``report.md`` and the figures of what was measured."""
    plain = [each for each in results if not each.comparison.axis]
    scaled = [each for each in results if each.comparison.axis]
    figures = []
    if plain:
        draw_ratios(folder / RATIOS, plain)
        figures += image("Processor time of each form over that of its reference, with quartiles", RATIOS)
    if scaled:
        draw_scaling(folder / SCALING, scaled)
        figures += image("Processor time by size, over that of the smallest size", SCALING)
    values = {
        "made_by": "benchmarks/run.py", "versions": versions(), "setting": vars(setting),
        "gates": [{**vars(gate), "passed": gate.passed} for gate in gates],
        "comparisons": [as_json(each) for each in results],
    }  # fmt: skip
    write_report(folder, values, [*heading(setting, gates), *figures, *ratio_table(results)])


def as_json(measured: Measured) -> dict[str, Any]:
    """Every number of one comparison."""
    return {
        "name": measured.comparison.name,
        "reference": measured.comparison.reference,
        "sizes": dict(measured.comparison.axis),
        "ratios": _spreads(measured.ratios),
        "cpu_milliseconds": _spreads(measured.milliseconds),
        "peak_bytes": dict(measured.peak_bytes),
    }


def _spreads(values: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    return {label: dict(vars(spread)) for label, spread in values.items()}


def heading(setting: Setting, gates: Sequence[Gate]) -> list[str]:
    """Where the figures come from, and the checks before them."""
    worst = max((gate.error for gate in gates), default=0.0)
    return [
        "# Benchmarks", "",
        f"- size: {setting.size}",
        f"- machine: {setting.machine}, {setting.threads} thread(s)",
        f"- {version_text()}",
        f"- {len(gates)} checks passed; the largest error is {worst:.1e}",
        "- times are processor times; a ratio is between two calls that follow each other",
        "",
    ]  # fmt: skip


def ratio_table(results: Sequence[Measured]) -> list[str]:
    """A row for each form: its time, its ratio with quartiles, and the memory it allocates."""
    rows = []
    for each in results:
        for label, spread in each.milliseconds.items():
            ratio = each.ratios.get(label)
            shown = "1" if ratio is None else show_interval(ratio.median, ratio.low, ratio.high, 3)
            rows.append(
                (each.comparison.name, label, f"{spread.median:.3f}", shown, f"{each.peak_bytes[label] / 2**20:.2f}")
            )
    return table(("comparison", "form", "time (ms)", "ratio (quartiles)", "peak (MiB)"), rows, "llrrr")


def draw_ratios(path: Path, results: Sequence[Measured]) -> None:
    """One row for each ratio, with its quartiles."""
    named = {name: spread for each in results for name, spread in each.named().items()}
    figure, (axes,) = panels(width=9, height=1 + 0.24 * len(named))
    for place, spread in enumerate(named.values()):
        interval_bar(axes, spread.low, spread.high, place, BLUE)
        axes.plot([spread.median], [place], "o", color=BLUE, markersize=4)
    rule(axes, x=1.0)
    name_rows(axes, list(named))
    axes.set_xscale("log")
    axes.set_xlabel("processor time over that of the reference")
    save(figure, path, grid="x")


def draw_scaling(path: Path, results: Sequence[Measured]) -> None:
    """A panel for each axis: time over that of the smallest size, beside a line of equal growth."""
    by_axis: dict[str, list[Measured]] = {}
    for each in results:
        by_axis.setdefault(each.comparison.name.rpartition(" over ")[2], []).append(each)
    figure, axes = panels(1, len(by_axis), width=3.2 * len(by_axis), height=3.4)
    for panel, (axis, measured) in zip(axes, by_axis.items(), strict=True):
        for place, each in enumerate(measured):
            sizes = list(each.comparison.axis.values())
            values = [each.ratios[label].median if label in each.ratios else 1.0 for label in each.comparison.axis]
            label = each.comparison.name.removeprefix("scaling, ").partition(", over ")[0]
            panel.plot(
                sizes, values, label=label, **(colors(place + 1) | {"marker": "osv^"[place % 4], "markevery": 1})
            )
        panel.plot(sizes, [size / sizes[0] for size in sizes], "--", color="#999999", label="as the size")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xlabel(axis)
    axes[0].set_ylabel("time over that of the smallest size")
    legend_outside(figure, axes[-1].get_legend_handles_labels()[0])
    save(figure, path)
