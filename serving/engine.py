"""The engine: the one thread that owns the model, and the queues through which everybody else reaches it.

The thread repeats: run the commands that are there (join, leave, save, ...), then take one frame of every line that has
one and answer them all in one tick. It waits at most ``gather_sec`` for lines that usually have one.

An exception of the model ends the engine: a tick that raises leaves every row undefined. A command whose request does
not fit (a memory of another model) is answered with its error, and the engine goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SiteStats, SlotOutput, SlotSettings
from moshi_ttt.serving.metrics import ServerMetrics

_log = logging.getLogger("moshi_ttt.serving")
Result = TypeVar("Result")

GATHER_SEC = 0.010
"""How long a tick waits for the frames of others."""
QUEUE_FRAMES = 4
"""Frames that wait for a tick at most: 320 ms. A longer queue is a delay that nobody can get rid of."""
QUIET_SEC = 0.5
"""A line that has sent nothing for so long is not waited for."""
STATS_SEC, STATS_SHARE = 1.0, 0.05
"""Seconds between two looks at a row's figures, at least, and the share of time that the looks at all rows may take."""


class RowSlots(Protocol):
    """What the engine needs of ``hosts.moshi.slots.Slots``."""

    count: int
    frame_size: int
    sample_rate: int
    frame_rate: float

    def join(self, row: int, settings: SlotSettings, state: RowState | None = None) -> None: ...
    def leave(self, row: int) -> None: ...
    def tick(self, frames: Mapping[int, Tensor]) -> Mapping[int, SlotOutput | None]: ...
    def set_updates(self, row: int, enabled: bool) -> None: ...
    def set_volume(self, row: int, volume: float) -> None: ...
    def forget(self, row: int) -> None: ...
    def restart(self, row: int) -> None: ...
    def save_row(self, row: int, kind: Literal["memory", "session"]) -> RowState: ...
    def stats(self, row: int) -> list[SiteStats]: ...


class EngineStoppedError(MoshiTTTError, RuntimeError):
    """The engine has ended, so it runs no command any more."""


@dataclass(eq=False)
class Line:
    """One caller's way into a row. The row may be somebody else's later; a line is one caller's for good.

    Attributes:
        row: which row.
        answered: called on the event loop with each output. Never after the line is closed.
        frames: that were answered or are in the delays of the model.
        dropped: that came when the queue was full. The oldest frame is dropped.
        delay_sec: from the arrival of the latest frame to its answer.
    """

    row: int
    answered: Callable[[SlotOutput], None]
    frames: int = 0
    dropped: int = 0
    delay_sec: float = 0.0
    is_open: bool = True
    last_frame: float = 0.0
    queue: deque[tuple[Tensor, float]] = field(default_factory=deque)


class Engine:
    """Owns ``slots`` from ``start`` to ``stop``. Its methods may be called from any thread.

    Args:
        post: runs a function on the event loop (``loop.call_soon_threadsafe``).
        failed: called on the event loop, once, when an exception has ended the engine.

    Attributes:
        failure: the exception that ended the engine.
        tick_sec: seconds of the latest tick.
        stats_sec: seconds that the latest look at a row's figures took.
    """

    def __init__(
        self,
        slots: RowSlots,
        *,
        post: Callable[[Callable[[], None]], object],
        failed: Callable[[BaseException], None],
        metrics: ServerMetrics,
        gather_sec: float = GATHER_SEC,
        queue_frames: int = QUEUE_FRAMES,
    ) -> None:
        self.slots = slots
        self.failure: BaseException | None = None
        self.tick_sec = 0.0
        self.stats_sec = 0.0
        self._post, self._failed, self._metrics = post, failed, metrics
        self._gather_sec, self._queue_frames = gather_sec, queue_frames
        self._changed = threading.Condition()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._lines: dict[int, Line] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="moshi-ttt engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """End after the commands that wait. Whether the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    # ---- from other threads

    def offer(self, line: Line, frame: Tensor) -> int:
        """Queue a frame, ``[S]`` float32. Returns how many older ones were dropped for it, 0 or 1."""
        now = time.perf_counter()
        with self._changed:
            if not line.is_open:
                return 0
            line.queue.append((frame, now))
            line.last_frame = now
            dropped = 0
            if len(line.queue) > self._queue_frames:
                line.queue.popleft()
                line.dropped += 1
                dropped = 1
            self._changed.notify()
        return dropped

    def submit(self, work: Callable[[RowSlots], Result]) -> Future[Result]:
        """Have the thread run ``work(slots)`` between two ticks. The future raises what ``work`` raises."""
        future: Future[Result] = Future()
        with self._changed:
            if self._stopping or self.failure is not None:
                future.set_exception(EngineStoppedError("The engine has ended. Start the server again."))
                return future
            self._commands.append((lambda: work(self.slots), future))
            self._changed.notify()
        return future

    def join(self, line: Line, settings: SlotSettings, state: RowState | None = None) -> Future[None]:
        """Begin a stream in the line's row, or begin anew. Frames that wait are of the stream before: they go."""

        def work(slots: RowSlots) -> None:
            slots.join(line.row, settings, state)
            with self._changed:
                line.queue.clear()
                self._lines[line.row] = line

        return self.submit(work)

    def leave(self, line: Line) -> Future[None]:
        """End the stream of a line. It gets no output from now on."""
        with self._changed:
            line.is_open = False
            line.queue.clear()

        def work(slots: RowSlots) -> None:
            if self._lines.get(line.row) is line:
                del self._lines[line.row]
                slots.leave(line.row)

        return self.submit(work)

    def stats(self, line: Line) -> Future[list[SiteStats]]:
        """What the memory of the line's row has done."""

        def work(slots: RowSlots) -> list[SiteStats]:
            begun = time.perf_counter()
            found = slots.stats(line.row)
            self.stats_sec = time.perf_counter() - begun
            return found

        return self.submit(work)

    @property
    def stats_every_sec(self) -> float:
        """Seconds between two looks at a row's figures, so that the looks at all rows leave time for ticks.

        On a GPU one look can take as long as half a frame.
        """
        return max(STATS_SEC, len(self._lines) * self.stats_sec / STATS_SHARE)

    # ---- the thread

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._run_commands()
                    self._tick(self._gather())
        except BaseException as error:  # whatever it is, somebody must hear of it
            self._end(error)
        else:
            self._end(None)

    def _wait(self) -> bool:
        """Until there is something to do. False when nothing is left and the engine is to stop."""
        with self._changed:
            while not self._commands and not any(line.queue for line in self._lines.values()):
                if self._stopping:
                    return False
                self._changed.wait()
            return not (self._stopping and not self._commands)

    def _run_commands(self) -> None:
        with self._changed:
            commands = list(self._commands)
            self._commands.clear()
        for index, (work, future) in enumerate(commands):
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except (MoshiTTTError, OSError) as error:  # of what was asked for, not of the model
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(error)
                with self._changed:
                    self._commands.extendleft(reversed(commands[index + 1 :]))
                raise

    def _gather(self) -> dict[Line, tuple[Tensor, float]]:
        """One frame of every line that has one, once those have one that usually do, or the time is over."""
        with self._changed:
            if not any(line.queue for line in self._lines.values()):
                return {}
            now = time.perf_counter()
            until = now + self._gather_sec
            usual = [line for line in self._lines.values() if now - line.last_frame < QUIET_SEC]
            while any(line.is_open and not line.queue for line in usual) and (left := until - time.perf_counter()) > 0:
                if self._commands or self._stopping:
                    break
                self._changed.wait(left)
            return {line: line.queue.popleft() for line in self._lines.values() if line.is_open and line.queue}

    def _tick(self, taken: Mapping[Line, tuple[Tensor, float]]) -> None:
        if not taken:
            return
        begun = time.perf_counter()
        outputs = self.slots.tick({line.row: frame for line, (frame, _) in taken.items()})
        ended = time.perf_counter()
        self._metrics.ticked(ended - begun, [ended - arrived for _, arrived in taken.values()])
        self.tick_sec = ended - begun
        for line, (_, arrived) in taken.items():
            line.frames += 1
            line.delay_sec = ended - arrived
        answers = [(line, output) for line in taken if (output := outputs[line.row]) is not None]
        self._to_loop(lambda: _deliver(answers))

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self.failure = error
            self._stopping = True
            left, self._commands = self._commands, deque()
            self._lines.clear()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineStoppedError("The engine has ended. Start the server again."))
        if error is not None:
            _log.error("engine failed", exc_info=error, extra={"fields": {"error": type(error).__name__}})
            self._to_loop(lambda: self._failed(error))

    def _to_loop(self, work: Callable[[], None]) -> None:
        try:
            self._post(work)
        except RuntimeError:  # the loop has been closed: nobody is there to be told
            _log.debug("an answer came after the event loop was closed")


def _deliver(answers: list[tuple[Line, SlotOutput]]) -> None:
    for line, output in answers:
        if line.is_open:
            line.answered(output)
