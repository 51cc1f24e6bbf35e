"""The figures of the documentation that show measurements: recall, loss by position, the inner loop's losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from figure_ink import FAINT, INK, TEXT, figure, label, legend, plain
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moshi_ttt.system.report.figures import BLUE, GREY, ORANGE

CONDITIONS = (("updates on", BLUE, "o"), ("updates off", GREY, "s"), ("memory of another", ORANGE, "D"))


GROUPS = {"test": "known voices", "test_unseen": "unseen voices"}
WHOLE = "played once, 48 to 959"
"""Speech played once, whole recordings, in ``metrics.json`` of the study."""


def draw_recall(metrics: Mapping[str, Any]) -> Figure:
    """The arms that the study chose, at their volumes: recall to the left, speech played once to the right.

    A row of panels for each group of test recordings, with intervals. To the right, only what updates on saves.
    """
    arms = list(dict.fromkeys(metrics["choices"]["arms"].values()))
    volumes = metrics["choices"]["volumes"]
    found = {
        (row["group"], row["arm"], row["condition"], row["what"]): row
        for row in metrics["figures"] if row["arm"] in arms and row["volume"] == volumes[row["arm"]]
    }  # fmt: skip
    drawn = figure(7.4, 1.2 + 0.5 * len(arms) * len(GROUPS))
    panels = drawn.subplots(len(GROUPS), 2, sharex="col", sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    for (left, right), (group, title) in zip(panels, GROUPS.items(), strict=True):
        for row, arm in enumerate(arms):
            for shift, (condition, color, marker) in enumerate(CONDITIONS):
                gain, y = found[group, arm, condition, "gain, second"], row + 0.22 * (shift - 1)
                _mark(left, gain, y, color, marker, condition if row == 0 else None)
            condition, color, marker = CONDITIONS[0]
            _mark(right, found[group, arm, condition, WHOLE], row, color, marker, None)
        left.set_yticks(range(len(arms)), [f"{arm},\nvolume {volumes[arm]:g}" for arm in arms])
        left.set(ylim=(len(arms) - 0.5, -0.5), title=title)
        for axes in (left, right):
            axes.axvline(0, color=INK, linewidth=0.8)
            plain(axes, grid="x")
    panels[-1][0].set_xlabel("recall: nats/token (95 % intervals)", color=INK, fontsize=TEXT)
    panels[-1][1].set_xlabel("saved, speech played once", color=INK, fontsize=TEXT)
    handles, names = panels[0][0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=3, frameon=False, fontsize=TEXT - 1, labelcolor=INK)
    return drawn


def _mark(axes: Axes, row: Mapping[str, Any], y: float, color: str, marker: str, named: str | None) -> None:
    """A figure and its interval."""
    axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.6)
    axes.plot(row["value"], y, marker, color=color, markersize=5, label=named, linestyle="none")


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
