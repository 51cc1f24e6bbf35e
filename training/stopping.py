"""Stopping on request: a signal ends a run at the next safe point, with a checkpoint of the last finished step.

Safe points are where all ranks can agree: before a step, between its micro-batches' forward and backward passes, at its
end, and between the segments of an evaluation. Whether a step that has begun is finished depends on the grace period.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from moshi_ttt.system.interruption import StopRequest, launched_by_torchrun
from moshi_ttt.training.runtime import Runtime

SAFETY = 1.5
"""A step is finished only if the time left is so many times what finishing and saving took before."""
TORCHRUN_SEC = 30
BYTES_PER_SEC = 200e6
"""How fast a checkpoint is taken to be written on a rank before one has been measured."""


def launcher_warnings(grace: float) -> list[str]:
    """Warnings about a grace period that is longer than that of this process's launcher."""
    if not launched_by_torchrun() or grace <= TORCHRUN_SEC or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ:
        return []
    return [
        f"stop_grace_sec is {grace:g}, and torchrun kills its ranks {TORCHRUN_SEC} s after a stop request "
        "(PyTorch 2.9 to 2.11 have no option for that). So long a grace holds only for a signal that the ranks get and "
        "torchrun does not."
    ]


class StepGivenUpError(Exception):
    """All ranks have left a step that there is no time to finish. Nothing has changed since the step before."""


@dataclass
class Pace:
    """How long steps and checkpoints have taken on this rank, in seconds.

    Attributes:
        steps: the last few.
        save: the slowest checkpoint that was written, or what one is expected to take.
        measured: whether ``save`` has been measured.
    """

    save: float
    measured: bool = False
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    @classmethod
    def expecting(cls, num_bytes: int) -> Pace:
        """Before anything is measured, of a run whose checkpoints have so many bytes on this rank."""
        return cls(save=num_bytes / BYTES_PER_SEC)

    @property
    def step(self) -> float:
        """The slowest of the last few steps; infinite before the first."""
        return max(self.steps, default=float("inf"))

    def saved(self, seconds: float) -> None:
        """Record the duration of a checkpoint."""
        self.save = max(self.save, seconds) if self.measured else seconds
        self.measured = True

    def warnings(self, grace: float, microbatches: int) -> dict[str, str]:
        """What a stop can cost, by kind; once there are two steps, because the first is slower than others."""
        if len(self.steps) < 2:
            return {}
        step, save = min(self.steps), self.save
        took = f"a step takes {step:.3g} s, a checkpoint {'' if self.measured else 'about '}{save:.3g} s, and "
        took += f"stop_grace_sec is {grace:g}"
        if step / microbatches + save > grace:
            return {
                "lost": f"Warning: {took}. A stop is seen between micro-batches: one that comes inside a micro-batch "
                "may be followed by a kill before anything is saved, and all since the last checkpoint is then lost. "
                "Take a smaller batch_size and more num_microbatches, save more often (ckpt_freq), or raise "
                "stop_grace_sec and the time that your launcher and scheduler give."
            }
        if step + save > grace:
            return {"given up": f"Warning: {took}. A stop gives up the step that is running, and saves the one before."}
        return {}


@dataclass
class SafePoints:
    """The points at which all ranks decide together whether to leave a step.

    Attributes:
        request: this rank's signals.
        grace: seconds from a signal to the moment when the process may be killed.
        began: when the step that is running began, by ``time.monotonic``.
    """

    request: StopRequest
    runtime: Runtime
    pace: Pace
    grace: float
    began: float = 0.0

    def pass_or_leave(self) -> None:
        """Raise StepGivenUpError on every rank when one was asked to stop and there is no time to finish the step.

        A collective: every rank calls this at the same places. Alone, it costs nothing.
        """
        missing = self._missing()
        if self.runtime.world_size > 1:
            missing = float(self.runtime.most(torch.tensor([missing]))[0])
        if missing > 0:
            raise StepGivenUpError

    def asked_anywhere(self) -> bool:
        """Whether some rank was asked to stop. A collective."""
        if self.runtime.world_size == 1:
            return self.request.asked
        return bool(self.runtime.most(torch.tensor([float(self.request.asked)]))[0])

    def _missing(self) -> float:
        """Seconds by which finishing the step and saving would be late; below 0 where there is time, or no stop."""
        since = self.request.requests.since
        if since is None:
            return -float("inf")
        now = time.monotonic()
        left = self.grace - (now - since)
        return SAFETY * (max(0.0, self.pace.step - (now - self.began)) + self.pace.save) - left
