"""Inner losses of a training run: measured on the first rank's rows at some steps, logged by position, and plotted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from moshi_ttt.configs.training import InnerLossConfig
from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.batches import Batch
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.inner_losses import SiteCurves, Sums, measured
from moshi_ttt.core.paths import user_path
from moshi_ttt.system.report.inner_losses import plot_site
from moshi_ttt.system.report.writer import number, numbers
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.logs import RunLog
from moshi_ttt.training.step import Step
from moshi_ttt.training.trainer import Trainer

FOLDER = "inner_losses"
SMOOTH = 12
"""Positions that a plot averages: about a second."""


class InnerLosses(Callback):
    """Measures the steps that are due; nothing of the training's numbers changes. On the rank that logs.

    Each block starts from its learned initial state, carried memory or not, so that curves of different steps compare.

    Args:
        options: what is measured, when, and where plots go.
        run_dir: where plots go when the options do not say.
    """

    def __init__(self, options: InnerLossConfig, run_dir: Path, injection: Injection, log: RunLog) -> None:
        self.options, self.injection, self.log = options, injection, log
        self.folder = user_path(options.plot_dir or str(run_dir / FOLDER))
        self.sites: list[SiteCurves] = []
        self.measures = False

    def around_step(self, trainer: Trainer, batches: Sequence[Batch]) -> AbstractContextManager[object]:
        number = trainer.step + 1
        due = number % self.options.interval == 0 or number == trainer.config.max_steps
        self.measures = self.options.wanted and due and bool(self.injection.blocks) and bool(batches)
        return self.measuring(max(batch.positions for batch in batches)) if self.measures else nullcontext()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if not (self.measures and self.sites):
            return
        self.log.write(self.record(step.number))
        if (problem := self.plot(step.number)) is not None:
            self.log.say(f"Warning: {problem}")

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
        seconds = {str(block.site): 1 / (block.info.frame_rate or 1.0) for block in self.injection.plan.blocks}
        for site in self.sites:
            title = f"{site.site} ({site.variant}), step {step}"
            with atomic_file(self.folder / f"step_{step:06d}_{site.site}.png") as temporary:
                plot_site(temporary, site, title=title, smooth=SMOOTH, frame_seconds=seconds[site.site])
