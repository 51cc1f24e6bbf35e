"""The figures of a quickstart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshi_ttt.apps.quickstart.evaluate import WINDOW, Curve
from moshi_ttt.apps.quickstart.recall import Twice
from moshi_ttt.apps.quickstart.results import QuickstartResults
from moshi_ttt.apps.quickstart.train import TrainingLog
from moshi_ttt.core.block import Site
from moshi_ttt.system.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, panels, rule, save

Values = NDArray[np.float64]

SITE_STYLES: Sequence[tuple[str, Any]] = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def plot_twice(path: Path, twice: Twice, results: QuickstartResults, *, frame_seconds: float) -> None:
    """Left: a clip presented twice, without and with the shipped adapter. Right: the loss along a recording."""
    figure, (left, right) = panels(1, 2, width=10, height=4.2, width_ratios=(3, 2))
    seconds = np.arange(1, 2 * twice.frames + 1) * frame_seconds
    for curve, color, style in ((twice.base, GREY, (0, (1, 1.2))), (twice.memory, BLUE, "-")):
        left.plot(
            seconds, _smooth(curve.values.numpy(), 16), color=color, linestyle=style, linewidth=2, label=curve.name
        )
    rule(left, x=twice.frames * frame_seconds)
    for place, text in ((0.25, "first presentation"), (0.75, "second presentation")):
        left.text(place, 0.02, text, transform=left.transAxes, ha="center", fontsize=9)
    left.set_title(f"A clip presented twice: {twice.saved:.2f} nats/token saved")
    for curve, color, style in ((results.base, GREY, (0, (1, 1.2))), (results.on, BLUE, "-")):
        along = np.arange(1, len(curve.values) + 1) * frame_seconds
        right.plot(along, _smooth(curve.values.numpy()), color=color, linestyle=style, linewidth=2, label=curve.name)
    right.set_title("A recording presented once, blocks trained here")
    for axes in (left, right):
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.08 * (high - low), high + 0.2 * (high - low))
        axes.set_xlabel("time (s)")
        axes.legend(loc="upper center", ncols=2, handlelength=2.2)
    left.set_ylabel("audio loss (nats/token)")
    save(figure, path, grid="both")


def plot_positions(path: Path, results: QuickstartResults, *, frame_seconds: float) -> None:
    """Above: the loss along the recording. Below: how much lower it is with updates on than otherwise."""
    figure, (above, below) = panels(2, width=8, height=6.4, sharex=True, height_ratios=(3, 2))
    styles: list[tuple[Curve | None, str, Any]] = [
        (results.base, GREY, (0, (1, 1.2))), (results.control, GREEN, "-."), (results.off, ORANGE, "--"),
        (results.cleared, PURPLE, (0, (4, 1, 1, 1, 1, 1))), (results.on, BLUE, "-"),
    ]  # fmt: skip
    best = results.on.values.numpy()
    seconds = np.arange(1, len(best) + 1) * frame_seconds
    for curve, color, style in styles:
        if curve is None:
            continue
        look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 2}
        values = curve.values.numpy()
        if curve is not results.off and curve is not results.cleared:  # five lines so close together hide each other
            above.plot(seconds, _smooth(values), label=f"{curve.name} ({curve.mean:.3f})", **look)
        if curve is not results.on:
            below.plot(seconds, _smooth(values - best), label=curve.name, **look)
    above.set_ylabel("audio loss (nats/token)")
    above.set_title("Held-out recording (in brackets: mean of the whole recording)")
    below.axhline(0, color=BLUE, linewidth=2)
    below.set_ylabel("loss minus the loss with\nupdates on (nats/token)")
    below.set_xlabel(
        f"position in the recording (s); each point is the mean of the {WINDOW * frame_seconds:.1f} s before it"
    )
    for axes in (above, below):
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axes.legend(loc="upper center", ncols=4, columnspacing=1.2, handlelength=2.2)
    save(figure, path, grid="both")


def plot_training(path: Path, log: TrainingLog) -> None:
    """Loss and gradient norm by step."""
    figure, (above, below) = panels(2, width=8, height=5.2, sharex=True, height_ratios=(3, 2))
    steps = np.arange(1, len(log.losses) + 1)
    span = max(1, len(steps) // 8)
    above.plot(steps, log.losses, color=BLUE, alpha=0.35, linewidth=1, label="each step")
    above.plot(steps, _smooth(np.array(log.losses), span), color=BLUE, linewidth=2, label=f"mean of the last {span}")
    above.set_ylabel("audio loss (nats/token)")
    above.set_title("Training the blocks; the base model is frozen")
    above.legend(loc="upper right")
    below.plot(steps, log.gradient_norms, color=ORANGE, linewidth=1.5)
    below.set_ylim(bottom=0)
    below.set_ylabel("gradient norm")
    below.set_xlabel("optimizer step")
    save(figure, path, grid="both")


def plot_state(path: Path, change: Mapping[Site, Sequence[float]], *, frame_seconds: float) -> None:
    """How far each block's fast weights have moved while the recording was streamed."""
    figure, (axes,) = panels(width=8, height=3.8)
    for index, (site, values) in enumerate(sorted(change.items())):
        color, style = SITE_STYLES[index % len(SITE_STYLES)]
        seconds = np.arange(1, len(values) + 1) * frame_seconds
        percent, name = 100 * np.array(values), str(site)
        axes.plot(seconds, percent, color=color, linestyle=style, linewidth=2, label=name)
    axes.set_title("Change of the fast weights during the stream")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("change of the fast weights\n(% of their initial norm)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    save(figure, path, grid="both")


def _smooth(values: Values, window: int = WINDOW) -> Values:
    """The mean of the last ``window`` values, once there are so many; NaN values are left out."""
    present = np.isfinite(values)
    sums = np.cumsum(np.where(present, values, 0.0))
    counts = np.cumsum(present).astype(float)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    with np.errstate(invalid="ignore"):
        means = np.asarray(np.where(counts > 0, sums / counts, np.nan))
    means[: min(window, len(values)) - 1] = np.nan
    return means
