"""The palette and the style of every figure. Figures are drawn without a display.

The palette is Okabe and Ito's (2008), which readers with any kind of color vision can tell apart. Curves differ in
their dashes or markers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = PALETTE
"""Grey is the base model's; a memory's is blue where there is one alone."""
RULE, SHADE = "#999999", "#EBEBEB"
"""Of lines that mark a place, and of grids and areas behind the curves."""
MARKERS = ("", "o", "s", "^")
"""They tell curves apart where there are more than colors."""
DPI = 120
TITLE, LABEL, TICK = 10.0, 9.0, 8.0
"""Sizes of text in points; legends are as the ticks."""


def colors(place: int) -> dict[str, Any]:
    """Color and marker of the curve at ``place``, from 0; no two of the first 32 look alike."""
    again, index = divmod(place, len(PALETTE))
    return {"color": PALETTE[index], "marker": MARKERS[again % len(MARKERS)], "markersize": 4, "markevery": 4}


def panels(
    rows: int = 1, columns: int = 1, *, width: float, height: float, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``width`` by ``height`` inches and its panels, row by row; ``options`` as in ``Figure.subplots``."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flatten())


def rule(axes: Axes, *, x: float | None = None, y: float | None = None, color: str = RULE) -> None:
    """A thin line behind the curves, at a position ``x`` or a value ``y`` or both."""
    if x is not None:
        axes.axvline(x, color=color, linewidth=1, zorder=0.5)
    if y is not None:
        axes.axhline(y, color=color, linewidth=1, zorder=0.5)


def interval_bar(axes: Axes, low: float, high: float, place: float, color: str, **line: Any) -> None:
    """An interval as a horizontal bar at the height ``place``; nothing where a bound is not finite."""
    if low <= high:  # false for NaN
        axes.plot([low, high], [place, place], "-", color=color, **{"linewidth": 2, **line})


def heading(axes: Axes, text: str) -> None:
    """A title at the left of a panel, for figures of several panels."""
    axes.set_title(text, loc="left", fontsize=LABEL)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One name a row, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def legend_outside(figure: Figure, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """A legend beside the panels, of ``handles`` or of the first panel."""
    if handles is None:
        handles = figure.axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside right upper", fontsize=TICK, frameon=False, **options)


def style(figure: Figure, *, grid: Any = "y") -> None:
    """Sizes of text, no frame above and to the right, and a light grid (``x``, ``y``, ``both``, or None)."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if grid is not None:
            axes.grid(axis=grid, color=SHADE, linewidth=0.8)
        axes.set_axisbelow(True)  # a grid over the curves would cross out a line at zero
        axes.tick_params(labelsize=TICK)
        axes.title.set_fontsize(TITLE)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(LABEL)
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set(facecolor="white", edgecolor="none", alpha=0.85)
            for entry in legend.get_texts():
                entry.set_fontsize(TICK)


def save(figure: Figure, path: Path, *, grid: Any = "y") -> None:
    """Style the figure and write it as a PNG, whatever the file is called."""
    style(figure, grid=grid)
    figure.savefig(path, format="png")
