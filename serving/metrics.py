"""Figures of a server for Prometheus. They count frames and seconds, never what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.24, 0.32, 0.5, 1.0)
"""Bounds of the histograms of seconds: a frame is 0.08."""
ROWS = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """The figures of one server, in a registry of its own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.tick_seconds = Histogram(
            "moshi_ttt_tick_seconds", "Seconds of a tick of all rows", buckets=SECONDS, registry=own
        )
        self.answer_seconds = Histogram(
            "moshi_ttt_answer_seconds", "Seconds from a frame's arrival to its answer", buckets=SECONDS, registry=own
        )
        self.tick_rows = Histogram("moshi_ttt_tick_rows", "Rows that had a frame in a tick", buckets=ROWS, registry=own)
        self.frames = Counter("moshi_ttt_frames", "Frames that were answered", registry=own)
        self.dropped = Counter(
            "moshi_ttt_dropped_frames", "Frames that were dropped because a queue was full", registry=own
        )
        self.connections = Counter("moshi_ttt_connections", "WebSockets that were opened", registry=own)
        self.closed = Counter(
            "moshi_ttt_closed_connections", "WebSockets that were closed, by code", ["code"], registry=own
        )
        self.sessions = Counter("moshi_ttt_sessions", "Sessions that began", registry=own)
        self.resumed = Counter(
            "moshi_ttt_resumed_sessions", "Sessions that went on after a lost connection", registry=own
        )
        self.memories = Counter("moshi_ttt_memories", "Memories by what was done with them", ["action"], registry=own)
        self.codec_seconds = Counter(
            "moshi_ttt_opus_seconds", "Seconds of the CPU in Opus", ["direction"], registry=own
        )
        self._rows = Gauge("moshi_ttt_rows", "Rows of the model by use", ["use"], registry=own)
        self._waiting = Gauge("moshi_ttt_waiting", "Clients that wait for a row", registry=own)
        self._open = Gauge("moshi_ttt_open_connections", "WebSockets that are open", registry=own)
        self._idle = Gauge("moshi_ttt_idle_connections", "Connections without a whole request", registry=own)
        self.idle_closed = Counter(
            "moshi_ttt_closed_idle_connections", "Connections that were closed because no whole request came",
            registry=own,
        )  # fmt: skip

    def ticked(self, seconds: float, waits: Sequence[float]) -> None:
        self.tick_seconds.observe(seconds)
        self.tick_rows.observe(len(waits))
        self.frames.inc(len(waits))
        for wait in waits:
            self.answer_seconds.observe(wait)

    def watch(self, use: Literal["taken", "free", "waiting", "open", "idle"], value: Callable[[], float]) -> None:
        """Read a gauge whenever somebody asks for the figures."""
        gauges = {"waiting": self._waiting, "open": self._open, "idle": self._idle}
        gauge = gauges[use] if use in gauges else self._rows.labels(use=use)
        gauge.set_function(value)

    def exposition(self) -> bytes:
        """The figures in Prometheus's text format."""
        return generate_latest(self.registry)
