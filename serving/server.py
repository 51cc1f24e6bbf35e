"""A server from beginning to end: the address, the engine, the routes, and the way it stops."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from aiohttp import web

from moshi_ttt.core.errors import ConfigError, MoshiTTTError
from moshi_ttt.serving.access import AccessRules
from moshi_ttt.serving.connection import Service
from moshi_ttt.serving.engine import Engine, RowSlots
from moshi_ttt.serving.http import HttpOptions, HttpService
from moshi_ttt.serving.logs import silent_logger
from moshi_ttt.serving.memory_store import MemoryStore
from moshi_ttt.serving.metrics import ServerMetrics
from moshi_ttt.serving.protocol import FAILED, GOING_AWAY
from moshi_ttt.serving.sessions import SessionLimits, Sessions
from moshi_ttt.system.interruption import stop_signals

_log = logging.getLogger("moshi_ttt.serving")
BACKLOG = 256


class ServeError(MoshiTTTError, RuntimeError):
    """A server that cannot start."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server does beside answering.

    Attributes:
        tls: None for plain http.
        seed: of clients that name none; None draws one for each.
        facts: what ``/api/info`` says of the model.
    """

    access: AccessRules = field(default_factory=AccessRules)
    sessions: SessionLimits = field(default_factory=SessionLimits)
    http: HttpOptions = field(default_factory=HttpOptions)
    store: MemoryStore | None = None
    tls: ssl.SSLContext | None = None
    seed: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, before a model is loaded for it. Raises ServeError where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServeError(f"--host {host}: there is no such address: {error}.") from None
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise ServeError(
            f"Cannot listen at {host}, port {port}: {error}. Another server may be running there. Choose another "
            "--port, or 0 for one that is free."
        ) from None
    return bound


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Raises ConfigError where one of the two is missing or wrong."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--tls-cert {certificate} and --tls-key {key} are no certificate and its key: {error}."
        ) from None
    return context


class Server:
    """A server that runs. Made by ``running``.

    Attributes:
        port: where it listens.
        failed: set when an exception has ended the engine.
    """

    def __init__(self, engine: Engine, sessions: Sessions, port: int, failed: asyncio.Event) -> None:
        self.engine, self.sessions, self.port, self.failed = engine, sessions, port, failed

    async def close(self) -> None:
        """Save what asked to be saved, say goodbye to everybody, end the engine."""
        if self.failed.is_set():
            await self.sessions.close(FAILED, "The model failed. Nothing of this session can be kept.")
        else:
            await self.sessions.close(GOING_AWAY, "The server shuts down. Goodbye.")
        await asyncio.to_thread(self.engine.stop)


@asynccontextmanager
async def running(
    slots: RowSlots, text_of: Callable[[int], str | None], listening: socket.socket, options: ServerOptions
) -> AsyncIterator[Server]:
    """A server of ``slots`` at a bound socket, for as long as the context lasts.

    Args:
        slots: belongs to the server's engine, and to nobody else, until the context ends.
        text_of: what a text token says; None for one that says nothing.
    """
    loop = asyncio.get_running_loop()
    failed = asyncio.Event()
    metrics = ServerMetrics()
    engine = Engine(
        slots, post=lambda work: loop.call_soon_threadsafe(work), failed=lambda error: failed.set(), metrics=metrics
    )
    sessions = Sessions(engine, slots.count, options.sessions, metrics, options.store)
    service = Service(
        engine=engine, sessions=sessions, metrics=metrics, text_of=text_of, rate=slots.sample_rate,
        frame_size=slots.frame_size,
        new_seed=lambda: secrets.randbelow(2**32) if options.seed is None else options.seed,
    )  # fmt: skip
    http = HttpService(service, options.access, options.facts, options.http)
    runner = web.AppRunner(
        http.app(), access_log=None, logger=silent_logger(), handle_signals=False, shutdown_timeout=1.0
    )
    await runner.setup()
    server = Server(engine, sessions, listening.getsockname()[1], failed)
    house = loop.create_task(sessions.keep_house())
    try:
        engine.start()
        assert runner.server is not None
        accepting = await loop.create_server(
            http.idle.watched(runner.server), sock=listening, ssl=options.tls, backlog=BACKLOG,
            ssl_handshake_timeout=None if options.tls is None else options.http.request_sec,
        )  # fmt: skip
        try:
            yield server
        finally:
            accepting.close()
    finally:
        await server.close()
        house.cancel()
        await asyncio.gather(house, return_exceptions=True)
        await runner.cleanup()


async def _serve(
    slots: RowSlots,
    text_of: Callable[[int], str | None],
    listening: socket.socket,
    options: ServerOptions,
    ready: Callable[[int], None],
) -> bool:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop.set)

    before = {number: signal.signal(number, asked) for number in stop_signals()}
    try:
        async with running(slots, text_of, listening, options) as server:
            _log.info("listening", extra={"fields": {"port": server.port, "slots": slots.count}})
            ready(server.port)
            waits = [loop.create_task(stop.wait()), loop.create_task(server.failed.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            _log.info("stopping", extra={"fields": {"failed": server.failed.is_set()}})
        return not server.failed.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def serve(
    slots: RowSlots,
    text_of: Callable[[int], str | None],
    listening: socket.socket,
    options: ServerOptions,
    ready: Callable[[int], None] = lambda port: None,
) -> bool:
    """Serve until a signal asks to stop. False where the engine failed.

    Args:
        ready: called with the port when clients can connect.

    Raises FolderInUseError where another server has the folder of memories.
    """
    with ExitStack() as stack:
        stack.callback(listening.close)
        if options.store is not None:
            stack.enter_context(options.store.opened())
        return asyncio.run(_serve(slots, text_of, listening, options, ready))
