"""Stopping when asked: a signal ends a run at the next safe point, with a checkpoint of the last finished step.

Safe points are where all ranks can agree: before a step, between its micro-batches' forward and backward passes, at its
end, and between the segments of an evaluation. Whether a step that has begun is finished depends on the grace period.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch

from moshi_ttt.apps.interruption import Interrupted, Requests, launched_by_torchrun, stop_signals
from moshi_ttt.apps.train.runtime import Runtime

SAFETY = 1.5
"""A step is finished only if the time left is so many times what finishing and saving took before."""
TORCHRUN_SEC = 30
BYTES_PER_SEC = 200e6
"""How fast a checkpoint is taken to be written on a rank before one has been measured."""


class StopRequest:
    """Inside ``with StopRequest() as stop:``, from ``stop.start`` on, a signal sets ``stop.asked`` and nothing else.

    Before that signals do what they did. After it a second Ctrl-C raises ``Interrupted``; see ``Requests``.

    Args:
        final: handlers that only a process of the command line has. Where one of them was set before, signals are
            ignored after the context: the process is about to end, and says by its exit code how the run ended.

    Attributes:
        started: all ranks have seen that none was asked to stop before there was anything to save.
    """

    def __init__(self, *, final: Collection[Any] = ()) -> None:
        self.requests = Requests()
        self.started = False
        self._final = final
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.requests.made

    def start(self, asked_anywhere: Callable[[], bool]) -> None:
        """From now on a signal is a request, and interrupts nothing. A collective.

        Raises Interrupted on every rank when some rank was asked to stop meanwhile.
        """
        for number in stop_signals():
            self._before.setdefault(number, signal.signal(number, self._handle))
        if asked_anywhere():
            raise Interrupted
        self.started = True

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_IGN if handler in self._final else handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requests.again(number):
            raise Interrupted


def launcher_warnings(grace: float) -> list[str]:
    """What is to be said of a grace period that is longer than this process's launcher gives."""
    if not launched_by_torchrun() or grace <= TORCHRUN_SEC or "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ:
        return []
    return [
        f"stop_grace_sec is {grace:g}, and torchrun kills its ranks {TORCHRUN_SEC} s after it was asked to stop "
        "(PyTorch 2.9 to 2.11 have no option for that). So long a grace holds only for a signal that the ranks get and "
        "torchrun does not."
    ]


class StepGivenUpError(Exception):
    """Every rank alike has left a step that there is no time to finish. Nothing has changed since the step before."""


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
        """Take note of a checkpoint."""
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
    """What all ranks agree on where a step can be left.

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
