"""The figures of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from moshi_ttt.system.report.figures import (
    PALETTE,
    colors,
    heading,
    interval_bar,
    legend_outside,
    panels,
    rule,
    save,
)
from study.curves import held_after, lasting_after
from study.results import WHOLE, Measured, StudyResults


def plot_answer(path: Path, results: StudyResults, groups: Mapping[str, str]) -> None:
    """A panel for each group: effect on speech played once to the right, recall upward, a point for each arm.

    Full circles are at the chosen volume, open ones at volume 1.
    """
    figure, axes_of = panels(len(groups), width=9.5, height=0.8 + 3.4 * len(groups), sharex=True)
    for axes, (group, title) in zip(axes_of, groups.items(), strict=True):
        rule(axes, x=0, y=0)
        for place, arm in enumerate(results.with_memory(group), start=1):
            chosen = float(results.choices["volumes"][arm])
            for volume in dict.fromkeys((1.0, chosen)):
                _point(axes, results, group, arm, volume, place, full=volume == chosen)
        heading(axes, title)
        axes.set_ylabel("recall (nats/token)")
    legend_outside(figure)
    axes_of[-1].set_xlabel("saved on speech played once (nats/token; below zero is a cost)")
    save(figure, path, grid="both")


def _point(axes: Axes, results: StudyResults, group: str, arm: str, volume: float, place: int, *, full: bool) -> None:
    other, color = results.reference(arm), colors(place)["color"]
    gain = results.gain(group, arm, other, volume=volume).interval
    effect = results.effect(group, arm, other, WHOLE, volume=volume).interval
    interval_bar(axes, effect.low, effect.high, gain.value, color, linewidth=1)
    axes.plot([effect.value] * 2, [gain.low, gain.high], color=color, linewidth=1)
    marker = "os^"[(place - 1) // len(PALETTE) % 3]
    axes.plot(
        effect.value, gain.value, marker, color=color, markersize=7, markerfacecolor=color if full else "white",
        label=arm if full else None, linestyle="none",
    )  # fmt: skip


def plot_volumes(path: Path, results: StudyResults, groups: Mapping[str, str]) -> None:
    """A panel for each group: the worst bucket of speech played once to the right, recall upward, a line for an arm."""
    figure, axes_of = panels(len(groups), width=9.5, height=0.8 + 3.2 * len(groups), sharex=True)
    buckets = range(1, 1 + len(results.scale["buckets"]))
    for axes, (group, title) in zip(axes_of, groups.items(), strict=True):
        rule(axes, x=0, y=0)
        for place, arm in enumerate(dict.fromkeys(results.choices["arms"].values()), start=1):
            other = results.reference(arm)
            points = [
                (
                    min(results.effect(group, arm, other, each, volume=volume).interval.value for each in buckets),
                    results.gain(group, arm, other, volume=volume).interval.value, volume,
                )
                for volume in results.volumes(group, arm)
            ]  # fmt: skip
            xs, ys, _ = zip(*points, strict=True)
            axes.plot(xs, ys, "o-", color=colors(place)["color"], label=arm)
            for x, y, volume in points:
                axes.annotate(f"{volume:g}", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        heading(axes, f"{title}; numbers: volume")
        axes.set_ylabel("recall (nats/token)")
    legend_outside(figure)
    axes_of[-1].set_xlabel("saved in the worst bucket of speech played once (nats/token)")
    save(figure, path, grid="both")


def plot_curves(path: Path, results: StudyResults, groups: Mapping[str, str]) -> None:
    """Two panels for each group: recall by minutes between, and by clips held at once, at the chosen volumes."""
    figure, axes_of = panels(len(groups), 2, width=11, height=0.8 + 2.8 * len(groups))
    for row, (group, title) in enumerate(groups.items()):
        lasting, held = axes_of[2 * row], axes_of[2 * row + 1]
        for place, arm in enumerate(dict.fromkeys(results.choices["arms"].values()), start=1):
            volume = float(results.choices["volumes"][arm])
            after = lasting_after(results, group, arm, volume)
            _curve(lasting, [each["minutes"] for each in after], [each["gain"] for each in after], place, arm)
            at_once = held_after(results, group, arm, volume)
            _curve(held, [each["held"] for each in at_once], [each["gain"] for each in at_once], place, arm)
        for axes in (lasting, held):
            rule(axes, y=0)
            axes.set_xscale("log")
            heading(axes, title)
            axes.set_ylabel("gain (nats/token)")
        lasting.set_xlabel("minutes of other speech between")
        held.set_xlabel("clips held at once")
    legend_outside(figure)
    save(figure, path)


def _curve(axes: Axes, xs: list[float], figures: list[Measured], place: int, label: str) -> None:
    intervals = [each.interval for each in figures]
    spread = [[each.value - each.low for each in intervals], [each.high - each.value for each in intervals]]
    axes.errorbar(
        xs, [each.value for each in intervals], yerr=spread, marker="o", markersize=4, capsize=3, linewidth=1.6,
        color=colors(place)["color"], label=label,
    )  # fmt: skip
