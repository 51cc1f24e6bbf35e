"""Connections on which no request is being answered: each has a deadline, and there is a limit to how many there are.

A client may send its request byte by byte, or keep a connection open after an answer. Each costs a file descriptor, so
each is closed when its time is over, before anybody knows who it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from moshi_ttt.serving.metrics import ServerMetrics

_log = logging.getLogger("moshi_ttt.serving")


class IdleConnections:
    """The deadlines of one server's connections. Its methods are called on the event loop.

    Args:
        seconds: from the connection, or from the last answer, until a request has come whole: its line and headers.
        most: so many at a time; a further one takes the place of the one that has waited longest.
    """

    def __init__(self, seconds: float, most: int, metrics: ServerMetrics) -> None:
        self._seconds, self._most, self._metrics = seconds, most, metrics
        self._transports: dict[asyncio.Protocol, asyncio.Transport] = {}
        self._deadlines: dict[asyncio.Protocol, asyncio.TimerHandle] = {}  # the longest wait comes first
        metrics.watch("idle", lambda: len(self._deadlines))

    def watched(self, handlers: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A factory of protocols as ``handlers`` makes them, for ``create_server``."""
        return lambda: _Watched(handlers(), self)

    @contextmanager
    def answering(self, handler: asyncio.Protocol) -> Iterator[None]:
        """A request of this connection has come whole, and is being answered."""
        self._stop_waiting(handler)
        try:
            yield
        finally:
            self._wait(handler)

    def opened(self, handler: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self._transports[handler] = transport
        self._wait(handler)

    def lost(self, handler: asyncio.Protocol) -> None:
        self._stop_waiting(handler)
        self._transports.pop(handler, None)

    def _wait(self, handler: asyncio.Protocol) -> None:
        if handler not in self._transports:
            return  # it went away
        while len(self._deadlines) >= self._most:
            self._close(next(iter(self._deadlines)))
        self._deadlines[handler] = asyncio.get_running_loop().call_later(self._seconds, self._close, handler)

    def _stop_waiting(self, handler: asyncio.Protocol) -> None:
        if (deadline := self._deadlines.pop(handler, None)) is not None:
            deadline.cancel()

    def _close(self, handler: asyncio.Protocol) -> None:
        self._stop_waiting(handler)
        self._metrics.idle_closed.inc()
        _log.debug("a connection without a request was closed")
        self._transports[handler].abort()


class _Watched(asyncio.Protocol):
    """Passes everything on to ``handler``, and says when the connection comes and goes."""

    def __init__(self, handler: asyncio.Protocol, idle: IdleConnections) -> None:
        self._handler, self._idle = handler, idle
        self.data_received = handler.data_received  # type: ignore[method-assign]  # for every message: no detour
        self.eof_received = handler.eof_received  # type: ignore[method-assign]
        self.pause_writing = handler.pause_writing  # type: ignore[method-assign]
        self.resume_writing = handler.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._handler.connection_made(transport)
        self._idle.opened(self._handler, cast(asyncio.Transport, transport))

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.lost(self._handler)
        self._handler.connection_lost(exc)
