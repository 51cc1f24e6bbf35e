"""Callbacks of a training run: bad data, parameters without gradients, health, log lines, grace period.

``validation``, ``saving`` and ``inner_losses`` hold the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from moshi_ttt.core.batches import Batch
from moshi_ttt.core.block import Site
from moshi_ttt.core.health import BlockHealth, HealthMonitor
from moshi_ttt.core.sharding import local
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.logs import RunLog, health_record, memory_bytes, step_record
from moshi_ttt.training.step import Step, TrainingError, some_of
from moshi_ttt.training.trainer import Trainer

CHECKED_STEPS = 2
"""Steps by which every trained parameter should have had a gradient."""


def due(number: int, every: int) -> bool:
    """Whether something happens after step ``number``; with ``every`` 0 or less it never does."""
    return every > 0 and number % every == 0


@dataclass
class BadData(Callback):
    """Prints problems of data on this rank, and ends the training when there are too many. On every rank.

    Attributes:
        segments: how many there are to train on.
        max_share: the largest share of them that may be unreadable.
        bad: how many were, on all ranks, since the run's first step.
    """

    segments: int
    max_share: float
    bad: int = 0
    told: set[str] = field(default_factory=set)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.warn(step.problems)
        self.bad += step.bad_segments
        drawn = max(self.segments, step.number * trainer.rows)
        self.check(self.bad, drawn, f"segments could not be read by step {step.number}")

    def warn(self, problems: Sequence[str]) -> None:
        """Print each problem once."""
        for problem in problems:
            if problem not in self.told:
                self.told.add(problem)
                print(f"Warning: skipped: {problem}", flush=True)

    def check(self, bad: int, all_of_them: int, what: str) -> None:
        """Raise TrainingError when ``bad`` of ``all_of_them`` is more than ``max_share``; ``what`` they are."""
        if bad > self.max_share * all_of_them:
            raise TrainingError(
                f"{bad} {what}, which is more than data.max_bad_share = {self.max_share} allows. Fix the recordings "
                "named above, or raise it."
            )


@dataclass
class IdleParameters(Callback):
    """Warns of trained parameters that got no gradient in the first steps. On every rank; ``log`` on the first.

    In the first step, what LoRA and in-place TTT multiply by zero has none; later, with carried memory, the initial
    fast weights have none. So a parameter is idle when it had no gradient in each of them.
    """

    log: RunLog | None
    idle: set[str] = field(default_factory=set)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if step.number > CHECKED_STEPS or step.skipped:
            return
        idle = without_gradient(trainer)
        self.idle = idle if step.number == 1 else self.idle & idle
        if step.number == CHECKED_STEPS and self.idle and self.log is not None:
            self.log.say(
                f"Warning: {len(self.idle)} trained tensors got no gradient in the first {step.number} steps: "
                f"{some_of(sorted(self.idle))}. Is a segment longer than a block's chunk, and is there text to predict?"
            )


@torch.no_grad()
def without_gradient(trainer: Trainer) -> set[str]:
    """Trained parameters that the last step gave no gradient, or one of zeros; every rank calls this."""
    named = trainer.trained.trained()
    largest = torch.zeros(len(named), device=trainer.runtime.device)
    for index, parameter in enumerate(named.values()):
        if parameter.grad is not None and (mine := local(parameter.grad)).numel():
            largest[index] = mine.abs().max()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return {name for name, value in zip(named, largest.tolist(), strict=True) if not value > 0}


@dataclass
class Health(Callback):
    """Measures the blocks at some steps and adds that to the step's record. On the rank that logs.

    Each of the first steps that is a power of two is measured, every ``every``-th, and the last.
    """

    log: RunLog
    every: int
    monitor: HealthMonitor | None = None
    told: set[Site] = field(default_factory=set)

    def around_step(self, trainer: Trainer, batches: Sequence[Batch]) -> AbstractContextManager[object]:
        number, blocks = trainer.step + 1, trainer.trained.injection.blocks
        early = number < self.every and number & (number - 1) == 0  # 1, 2, 4, 8, ...
        measured = early or number % self.every == 0 or number == trainer.config.max_steps
        self.monitor = HealthMonitor(blocks, sample=True) if blocks and measured else None
        return self.monitor or nullcontext()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if self.monitor is None:
            return
        found = self.monitor.read()
        if found:
            step.record["blocks"] = health_record(found)
        self._warn(found)

    def _warn(self, health: Mapping[Site, BlockHealth]) -> None:
        """Warn once of each block with a red flag; the log has every measurement."""
        for site, found in health.items():
            if found.red_flags and site not in self.told:
                self.told.add(site)
                self.log.say(f"Warning: the block at {site} is not healthy: {' '.join(found.red_flags)}")


@dataclass
class Logging(Callback):
    """Writes a line for every ``every``-th step, the last, those that were skipped, and those with a record of their
    own. On the rank that logs; after the callbacks that add to a step's record.
    """

    log: RunLog
    every: int

    def after_step(self, trainer: Trainer, step: Step) -> None:
        last = step.number == trainer.config.max_steps
        if due(step.number, self.every) or last or step.skipped or step.record:
            record = {**step_record(step, memory_bytes(trainer.runtime.device)), **step.record}
            self.log.write(record)
            self.log.show(record)


@dataclass
class GraceWarnings(Callback):
    """Warns when a stop may lose a step because the grace period is short. On the rank that logs."""

    log: RunLog
    grace: float
    told: set[str] = field(default_factory=set)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if trainer.safe is None:
            return
        for kind, warning in trainer.safe.pace.warnings(self.grace, trainer.config.num_microbatches).items():
            if kind not in self.told:
                self.told.add(kind)
                self.log.say(warning)
