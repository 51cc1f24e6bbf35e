"""The callback that computes losses on held-out data while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moshi_ttt.core.batches import Batch
from moshi_ttt.training.callback import Callback
from moshi_ttt.training.callbacks import BadData, due
from moshi_ttt.training.logs import RunLog, eval_line, loss_record
from moshi_ttt.training.step import Step
from moshi_ttt.training.trainer import Trainer


@dataclass
class Validation(Callback):
    """Losses on held-out documents after every ``every``-th step and after the last one. On every rank.

    Attributes:
        documents: makes this rank's held-out documents, each a list of consecutive batches; equally many batches on
            every rank.
        segments: how many segments they have on all ranks.
        every: steps between two evaluations; 0 or less evaluates at the end alone.
        problems: says what cannot be read.
        log: on the first rank.
        missing: the run is resumed where the evaluation after its last step had not been made: it comes first.
    """

    documents: Callable[[], Iterable[Iterable[Batch]]]
    segments: int
    every: int
    problems: BadData
    log: RunLog | None
    missing: bool = False

    def begin(self, trainer: Trainer) -> None:
        if self.missing and self.is_due(trainer, trainer.step):
            self.evaluate(trainer)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if not trainer.outcome.stopped and self.is_due(trainer, step.number):
            self.evaluate(trainer)

    def is_due(self, trainer: Trainer, number: int) -> bool:
        """Whether there is an evaluation after this step."""
        return due(number, self.every) or number >= trainer.config.max_steps

    def evaluate(self, trainer: Trainer) -> None:
        """When a stop comes before the end, there are no losses: they are computed when the run is resumed."""
        number = trainer.step
        losses, problems = trainer.evaluate(self.documents(), safe=trainer.safe)
        self.problems.warn(problems)
        bad = int(trainer.runtime.sum(torch.tensor([float(len(problems))])))
        self.problems.check(bad, self.segments, f"held-out segments could not be read after step {number}")
        if losses is None:
            trainer.outcome.stopped = True
            return
        trainer.outcome.losses[number] = losses
        if self.log is not None:
            record = {"kind": "eval", "step": number, **loss_record(losses), "bad_segments": bad}
            self.log.write(record)
            self.log.say(eval_line(record, losses))
