"""Inner losses of a training run: measured on the first rank's rows at some steps, logged by position, and plotted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.inner_losses import SiteCurves, Sums, measured
from moshi_ttt.core.paths import user_path
from moshi_ttt.hosts.moshi.upstream import FRAME_RATE
from moshi_ttt.system.report.inner_losses import plot_site
from moshi_ttt.system.report.writer import number, numbers

FOLDER = "inner_losses"
SMOOTH = 12
"""Positions that a plot averages: about a second."""


class InnerLosses:
    """Measures the steps that are due; nothing of the training's numbers changes.

    Each block starts from its learned initial state, carried memory or not, so that curves of different steps compare.
    """

    def __init__(self, run: RunConfig, injection: Injection) -> None:
        self.options, self.last = run.inner_losses, run.max_steps
        self.injection = injection
        self.folder = user_path(self.options.plot_dir or str(Path(run.run_dir, FOLDER)))
        self.sites: list[SiteCurves] = []

    def due(self, step: int) -> bool:
        """Whether this step is measured."""
        wanted = self.options.wanted and bool(self.injection.blocks)
        return wanted and (step % self.options.interval == 0 or step == self.last)

    @contextmanager
    def measuring(self, frames: int) -> Iterator[None]:
        """Measure the forward passes inside, of up to ``frames`` positions."""
        sums = {site: Sums(block, frames) for site, block in sorted(self.injection.blocks.items())}
        with measured(sums):
            yield
        self.sites = [each.curves(site) for site, each in sums.items() if each.values]

    def record(self, step: int) -> dict[str, Any]:
        """A line of ``metrics.jsonl``: of each block, means over the tokens after the first update, and by position."""
        return {
            "kind": FOLDER, "step": step,
            "blocks": {
                site.site: {
                    "variant": site.variant, "tokens": site.tokens, "first_updated_position": site.first_updated,
                    "not_finite": site.not_finite,
                    "mean": {name: number(float(mean.mean())) for name, mean in site.means.items()},
                    "by_position": {name: numbers(curve.mean(0)) for name, curve in site.by_position.items()},
                }
                for site in self.sites
            },
        }  # fmt: skip

    def plot(self, step: int) -> str | None:
        """A png for each block, where plots are asked for; each file appears whole. What went wrong: a plot that cannot
        be written does not end a training.
        """
        if not self.options.plots:
            return None
        try:
            self._plot(step)
        except OSError as error:
            return f"the inner losses of step {step} cannot be drawn in {self.folder}: {error}"
        return None

    def _plot(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for site in self.sites:
            title = f"{site.site} ({site.variant}), step {step}"
            with atomic_file(self.folder / f"step_{step:06d}_{site.site}.png") as temporary:
                plot_site(temporary, site, title=title, smooth=SMOOTH, frame_seconds=1 / FRAME_RATE)
