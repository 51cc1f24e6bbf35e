"""What all figures of the documentation share: ink that follows light and dark mode, and a panel without a frame."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#010203", "#040506"
"""Stand for the reader's text color and for faint lines; ``draw_figures.svg`` replaces them."""
TEXT = 9.0


def figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` by ``height`` inches, with room decided by what is in it."""
    return Figure(figsize=(width, height), layout="constrained")


def canvas(drawn: Figure, width: float, height: float) -> Axes:
    """One panel without axes, in units of its own: for diagrams."""
    axes = drawn.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return axes


def plain(axes: Axes, *, grid: str | None = "y") -> None:
    """Ink for everything that is not data; no frame above and to the right; a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    if grid is not None:
        axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=TEXT - 1, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set(color=INK, fontsize=TEXT)


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame, in ink."""
    axes.legend(frameon=False, fontsize=TEXT - 1, labelcolor=INK, **options)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = INK, **style: Any) -> None:
    """An arrow between two points of a diagram."""
    shape = {"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", end, start, arrowprops=shape | style)


def label(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Text in ink, centered on a point."""
    axes.text(x, y, text, **{"color": INK, "fontsize": TEXT, "ha": "center", "va": "center"} | style)
