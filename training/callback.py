"""The contract of a callback: code that runs before, around and after a trainer's steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from moshi_ttt.core.batches import Batch

if TYPE_CHECKING:
    from moshi_ttt.training.step import Step
    from moshi_ttt.training.trainer import Trainer


class Callback:
    """The base class: every method does nothing. ``Trainer.fit`` calls its callbacks in the order they are given.

    A method that communicates between ranks must be called on every rank: give such a callback to every rank's trainer.
    """

    @property
    def ready(self) -> bool:
        """What this rank says before a step; ``Step.ready`` is true when every callback on every rank said True."""
        return True

    def begin(self, trainer: Trainer) -> None:
        """Before the first step."""

    def around_step(self, trainer: Trainer, batches: Sequence[Batch]) -> AbstractContextManager[object]:
        """A context in which the step ``trainer.step + 1`` is made over this rank's ``batches``.

        It sees StepGivenUpError when the step is given up. ``batches`` may be empty where this rank has been asked to
        stop.
        """
        return nullcontext()

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """After each step. ``trainer.outcome.stopped`` says that no other follows; setting it ends the training."""

    def give_up(self, trainer: Trainer) -> None:
        """When the training ends with a TrainingError, which every rank raises alike."""

    def end(self, trainer: Trainer) -> None:
        """After the last step, also when the training was stopped; not after an error."""
