"""The figures of the documentation that show measurements: recall, loss by position, the inner loop's losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from figure_ink import FAINT, INK, TEXT, figure, label, legend, plain
from matplotlib.figure import Figure

from moshi_ttt.system.report.figures import BLUE, GREY, ORANGE

CONDITIONS = (("updates on", BLUE, "o"), ("updates off", GREY, "s"), ("memory of another", ORANGE, "D"))
RESAMPLES = 2_000


def draw_recall(study: Mapping[str, Any]) -> Figure:
    """A row for each arm of the study and a mark for each condition: recall beyond the base model's, with intervals."""
    group = study["groups"]["recall, test"]
    found = {(each["subject"], each["condition"]): each for each in group["figures"] if each["what"] == "second"}
    base = np.asarray(found["base", "updates on"]["by_recording"]).mean(0)  # [recordings], of [seeds, recordings]
    arms = [name for name in group["parameters"] if name != "base"]
    drawn = figure(7.2, 0.8 + 0.42 * len(arms))
    axes = drawn.add_subplot()
    for row, arm in enumerate(arms):
        for shift, (condition, color, marker) in enumerate(CONDITIONS):
            if (arm, condition) not in found:
                continue
            gains = np.asarray(found[arm, condition]["by_recording"]).mean(0) - base
            low, high = interval(gains)
            y, named = row + 0.22 * (shift - 1), condition if row == _first(arms, found, condition) else None
            axes.plot([low, high], [y, y], color=color, linewidth=1.6)
            axes.plot(gains.mean(), y, marker, color=color, markersize=5, label=named, linestyle="none")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel="recall: nats/token (95 % intervals over recordings)")
    plain(axes, grid="x")
    legend(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return drawn


def _first(arms: list[str], found: Mapping[tuple[str, str], Any], condition: str) -> int:
    return next(row for row, arm in enumerate(arms) if (arm, condition) in found)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of ``values [n]``, the same each time."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def draw_position(measured: Mapping[str, Any]) -> Figure:
    """Audio loss by window of one recording, of the base model and with the memory; below, what is saved."""
    drawn = figure(7.2, 4.2)
    above, below = drawn.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
    seconds = np.asarray(measured["seconds"])
    base = np.asarray(measured["losses"]["base"])
    styles = {"base": (GREY, "-", "base model"), "on": (BLUE, "-", "with the memory"),
              "off": (ORANGE, "--", "with the memory, updates off")}  # fmt: skip
    for name, (color, line, said) in styles.items():
        losses = np.asarray(measured["losses"][name])
        above.plot(seconds, losses, line, color=color, label=said, linewidth=1.6)
        if name != "base":
            below.plot(seconds, base - losses, line, color=color, linewidth=1.6)
    below.axhline(0, color=INK, linewidth=0.8)
    for axes in (above, below):
        axes.axvline(measured["context_seconds"], color=FAINT, linewidth=1.4)
        plain(axes)
    label(
        above,
        measured["context_seconds"] + 0.5,
        above.get_ylim()[1],
        "attention window",
        ha="left",
        va="top",
        fontsize=8,
    )
    above.set_ylabel("audio loss, nats/token")
    below.set(ylabel="saved", xlabel="position in the recording, s")
    legend(above, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return drawn


def draw_inner_loop(measured: Mapping[str, Any]) -> Figure:
    """A panel for each block: the inner loss at the initial weights, before and after each update."""
    sites = measured["sites"]
    drawn = figure(7.2, 2.8)
    panels = drawn.subplots(1, len(sites), squeeze=False)[0]
    curves = {"initial": (GREY, ":", "initial weights"), "before": (ORANGE, "--", "before the update"),
              "after": (BLUE, "-", "after the update")}  # fmt: skip
    for axes, site in zip(panels, sites, strict=True):
        for name, (color, line, said) in curves.items():
            axes.plot(measured["seconds"], site[name], line, color=color, label=said, linewidth=1.6)
        axes.set_title(site["site"], loc="left", color=INK, fontsize=TEXT)
        axes.set_xlabel("position in the recording, s")
        plain(axes)
    panels[0].set_ylabel("inner loss")
    handles, names = panels[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper right", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return drawn
