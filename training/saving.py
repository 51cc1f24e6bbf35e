"""The callback that saves checkpoints while a model trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_ttt.training.callback import Callback
from moshi_ttt.training.callbacks import due
from moshi_ttt.training.checkpoint import CheckpointWriter, Export
from moshi_ttt.training.step import Step
from moshi_ttt.training.trainer import Trainer


@dataclass
class Checkpoints(Callback):
    """Saves after every ``every``-th step, after the last one, and when the training is stopped. On every rank.

    A checkpoint is written in the background; the step after all ranks have written their parts makes it appear.

    Attributes:
        every: steps between two checkpoints; 0 or less saves at the end alone.
        position: what ``state.json`` says beside the step, now.
        export: gathers what others use, on all ranks together, and returns what writes it into a folder, on one.
    """

    writer: CheckpointWriter
    every: int
    position: Callable[[], Mapping[str, Any]]
    export: Callable[[int], Export]

    @property
    def ready(self) -> bool:
        return self.writer.ready

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if step.ready:
            self._committed(trainer, self.writer.commit())
        if not trainer.outcome.stopped and (step.number >= trainer.config.max_steps or due(step.number, self.every)):
            self._save(trainer)

    def give_up(self, trainer: Trainer) -> None:
        """What is being written is finished: it is of a step before."""
        self._finish(trainer)

    def end(self, trainer: Trainer) -> None:
        if trainer.outcome.stopped and trainer.step > 0:
            self._save(trainer)
        self._finish(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Begin a checkpoint, unless this run has one of this step."""
        if self.writer.has(trainer.step):
            return
        self._finish(trainer)  # an earlier checkpoint first
        began = time.monotonic()
        self.writer.save(trainer, position=self.position(), export=self.export(trainer.step), began=began)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        self._committed(trainer, self.writer.finish())

    def _committed(self, trainer: Trainer, folder: Path | None) -> None:
        if folder is not None:
            trainer.outcome.checkpoint = folder
            if trainer.safe is not None:
                trainer.safe.pace.saved(self.writer.seconds)
