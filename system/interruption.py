"""Signals that ask a process to stop, and when another signal counts as a second request.

One stop often comes as several signals. A scheduler signals every process of a job and torchrun passes on what it gets,
so a rank gets SIGTERM twice; a terminal sends Ctrl-C to the launcher and to its ranks, and the launcher passes it on.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75
"""A training that was asked to stop, saved what it had and can be resumed: EX_TEMPFAIL, "try again later"."""
STUCK_SEC = 5.0
"""How long a rank that starts may take to leave after a signal."""
AGAIN_SEC = 2.0
"""A second Ctrl-C counts when it comes so many seconds after the first, or later."""


def stop_signals() -> list[int]:
    """Ctrl-C, a termination, and the end of the terminal's session where the process has not been told to ignore it."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(hangup)
    return numbers


def launched_by_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Interrupted(KeyboardInterrupt):
    """Raised to end a process that is asked to stop and has nothing to save.

    A type of its own, because CPython remembers a plain KeyboardInterrupt that passes through ``exec`` of a string
    (dataclasses and pydantic do that while they are imported) and then ends by a signal, although it was caught.
    """


class Requests:
    """Tells a new request to stop from another signal of the same one.

    The first signal is a request. After it only Ctrl-C can be a second request, when a person sends it ``AGAIN_SEC``
    after the first Ctrl-C; under torchrun, which passes signals on whenever it gets to it, nothing is.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._first_interrupt: float | None = None
        self._launched = launched_by_torchrun()

    @property
    def made(self) -> bool:
        return self.since is not None

    def again(self, number: int) -> bool:
        """Record a signal. Return whether it is a second request."""
        now = time.monotonic()
        if self.since is None:
            self.since = now
        if number != signal.SIGINT:
            return False
        if self._first_interrupt is None:
            self._first_interrupt = now
        return not self._launched and now - self._first_interrupt >= AGAIN_SEC


class Interruption:
    """A handler that raises ``Interrupted`` at a request, and at a second one; other signals change nothing.

    So what clears away half-written files on the way out is not itself interrupted by another signal of the same stop.
    """

    def __init__(self) -> None:
        self._requests = Requests()
        self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first = not self._requests.made
        if self._requests.again(number) or first or self._waiting:
            self._raise_outside_imports(frame)

    def _raise_outside_imports(self, frame: FrameType | None) -> None:
        # A module that is being imported may swallow whatever is raised inside it: wait until it is done.
        self._waiting = _is_importing(frame)
        if not self._waiting:
            raise Interrupted
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, lambda number, frame: self._raise_outside_imports(frame))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:  # Windows has no alarm: a thread asks this handler once more
            timer = threading.Timer(0.05, _thread.interrupt_main)
            timer.daemon = True
            timer.start()


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
        self._watch = ExitStack()

    @property
    def asked(self) -> bool:
        return self.requests.made

    def start(self, asked_anywhere: Callable[[], bool]) -> None:
        """From now on a signal is a request, and interrupts nothing. A collective.

        Raises Interrupted on every rank when some rank was asked to stop meanwhile.
        """
        for number in stop_signals():
            self._before.setdefault(number, signal.signal(number, self._handle))
        self._watch.close()
        if asked_anywhere():
            raise Interrupted
        self.started = True

    def __enter__(self) -> StopRequest:
        if self._final and launched_by_torchrun():
            self._watch.enter_context(leave_when_stuck())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.close()
        for number, handler in self._before.items():
            # None: a handler that was not set from Python, and cannot be set again from here.
            signal.signal(number, signal.SIG_IGN if handler in self._final else handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requests.again(number):
            raise Interrupted


@contextmanager
def leave_when_stuck() -> Iterator[None]:
    """End this process ``STUCK_SEC`` after a signal to stop if the context has not been left by then.

    A rank that starts may wait, where no handler of Python's runs, for one that has been stopped and never comes. It
    has nothing to save yet, so a thread that sees the signal ends it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = set(stop_signals())
    ended = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] in numbers and not ended.wait(STUCK_SEC):
                print("Stopped on request before the first step, while waiting for another rank.", file=sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_STOPPED)
        reader.close()

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def handle(numbers: list[int], handler: Callable[[int, FrameType | None], None] | int) -> None:
    """Set one handler for several signals."""
    for number in numbers:
        signal.signal(number, handler)
