"""Two diagrams: where a block goes in a layer of Moshi, and what happens in a chunk."""

from __future__ import annotations

from figure_ink import FAINT, INK, TEXT, arrow, canvas, figure, label
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from moshi_ttt.system.report.figures import BLUE, GREY, ORANGE

LIGHT = 0.18
"""How much of its color a box is filled with: text on it stays readable on light and on dark paper."""


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, *, dashed: bool = False
) -> None:
    """A box with its lower left corner at (x, y)."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.4, "linestyle": "--" if dashed else "-"}
    for fill, alpha, edge in ((color, LIGHT, "none"), ("none", None, color)):
        axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, alpha=alpha, edgecolor=edge, **shape))
    label(axes, x + width / 2, y + height / 2, text)


def draw_architecture() -> Figure:
    """One layer, from left to right: attention, the block of kind ``sequence``, the gated MLP with its fast weight."""
    drawn = figure(7.6, 3.3)
    axes = canvas(drawn, 19.0, 8.2)
    line = 1.6  # the residual stream
    arrow(axes, (0.3, line), (18.7, line), linewidth=1.8, mutation_scale=13)
    label(axes, 0.3, line - 0.75, "x", ha="left", style="italic")
    label(axes, 18.7, line - 0.75, "next layer", ha="right")
    parts = ((1.0, "attention", GREY), (6.1, "TTT block\nkind sequence", BLUE), (12.4, "gated MLP", GREY))
    for x, name, color in parts:
        box(axes, x, 3.1, 3.6, 1.5, name, color)
        arrow(axes, (x + 0.7, line), (x + 0.7, 3.1))
        arrow(axes, (x + 2.9, 3.1), (x + 2.9, line + 0.28))
        axes.plot(x + 2.9, line, "o", markersize=11, markeredgecolor=INK, markerfacecolor="none")
        label(axes, x + 2.9, line, "+", fontsize=TEXT + 1)
    label(axes, 9.6, 2.35, "times gate", ha="left")
    box(axes, 6.1, 5.9, 3.6, 1.4, "fast weights W", BLUE, dashed=True)
    arrow(axes, (7.2, 5.9), (7.2, 4.6), color=BLUE)
    arrow(axes, (8.6, 4.6), (8.6, 5.9), color=BLUE)
    label(axes, 7.05, 5.25, "read", ha="right")
    label(axes, 8.75, 5.25, "update, once a chunk", ha="left")
    box(axes, 11.7, 5.9, 5.0, 1.4, "in-place TTT: what is\nadded to $W_{down}$", ORANGE, dashed=True)
    arrow(axes, (13.5, 5.9), (13.5, 4.6), color=ORANGE)
    arrow(axes, (14.9, 4.6), (14.9, 5.9), color=ORANGE)
    label(axes, 15.1, 5.25, "kind feed_forward", ha="left")
    said = "Dashed: changes while\nthe stream runs.\nGrey: the base model,\nunchanged."
    label(axes, 1.0, 7.3, said, ha="left", va="top", fontsize=TEXT - 1)
    return drawn


def draw_chunk() -> Figure:
    """Two chunks of four tokens: which weights each token reads, and when they change."""
    drawn = figure(7.6, 3.2)
    axes = canvas(drawn, 19.0, 8.0)
    for chunk in range(2):
        left = 1.6 + 8.6 * chunk
        for place in range(4):
            x, token = left + 1.75 * place, 4 * chunk + place
            box(axes, x, 0.4, 1.3, 1.1, f"$x_{{{token}}}$", GREY)
            arrow(axes, (x + 0.65, 1.5), (x + 0.65, 2.6))
            box(axes, x, 2.6, 1.3, 1.1, f"$W_{{{token}}}$", BLUE)
            arrow(axes, (x + 0.65, 3.7), (x + 0.65, 4.8))
            label(axes, x + 0.65, 5.2, f"$y_{{{token}}}$")
            axes.plot([left, x + 1.3], [2.15 - 0.13 * place] * 2, color=BLUE, linewidth=1.6)
        label(axes, left + 3.3, 6.5, f"chunk {chunk + 1}: gradients at $W^{{({chunk})}}$")
        axes.plot([left - 0.1, left + 6.65], [6.0, 6.0], color=FAINT, linewidth=1.2)
        arrow(axes, (left + 6.55, 3.15), (left + 8.6 if chunk == 0 else left + 7.7, 3.15), color=ORANGE, linewidth=2)
        label(axes, left + 7.6, 3.7, f"$W^{{({chunk + 1})}}$")
    arrow(axes, (0.1, 3.15), (1.6, 3.15), color=ORANGE, linewidth=2)
    label(axes, 0.8, 3.7, "$W^{(0)}$")
    label(axes, 9.5, 7.6, "A token reads W minus the gradients of its chunk up to its own (blue bars).", fontsize=TEXT)
    return drawn
