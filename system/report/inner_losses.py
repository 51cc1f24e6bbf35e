"""The figure of one block's inner losses by position, for `evaluate inner-loop` and for a run of training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moshi_ttt.core.inner_losses import CURVES, SiteCurves
from moshi_ttt.system.report.figures import BLACK, BLUE, GREY, ORANGE, legend_outside, panels, save

LOOKS = ((GREY, "--"), (BLUE, "-"), (ORANGE, "-"), (BLACK, ":"))


def running_mean(values: Tensor, window: int) -> Tensor:
    """Means of ``values [T]`` over ``window`` positions around each, fewer at the ends; NaN is left out, and stays."""
    missing = values.isnan()
    index = torch.arange(len(values))
    first = (index - (window - 1) // 2).clamp(min=0)
    end = (index + window // 2 + 1).clamp(max=len(values))
    sums, counts = (
        torch.cat([part.new_zeros(1), part.double().cumsum(0)]) for part in (values.nan_to_num(0), (~missing).double())
    )
    return ((sums[end] - sums[first]) / (counts[end] - counts[first])).masked_fill(missing, torch.nan)


def plot_site(path: Path, site: SiteCurves, *, title: str, smooth: int, frame_seconds: float) -> None:
    """A png of a block's four curves, means over its heads; ``smooth`` positions are averaged."""
    figure, (axes,) = panels(width=9.5, height=4.5)
    for (name, label), (color, dashes) in zip(CURVES.items(), LOOKS, strict=True):
        mean = running_mean(site.by_position[name].mean(0), smooth)
        seconds = [position * frame_seconds for position in range(len(mean))]
        axes.plot(seconds, mean, label=label, color=color, linestyle=dashes, linewidth=1.5)
    axes.set_xlabel(f"position (s), running mean over {smooth * frame_seconds:.1f} s")
    axes.set_ylabel("inner loss, mean over heads")
    axes.set_title(title)
    legend_outside(figure)
    save(figure, path)
