"""One WebSocket: what it hears, what it says, and how it ends.

Three tasks: one receives, one sends from a short queue, one (for clients that speak our messages) tells the figures of
the memory every second. A client that does not read fills the queue and is closed; nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.hosts.moshi.slots import SlotOutput
from moshi_ttt.serving import protocol
from moshi_ttt.serving.audio import Framer, NotAudioError, TooMuchAudioError, codecs
from moshi_ttt.serving.commands import ClientCommands
from moshi_ttt.serving.engine import Engine, EngineStoppedError
from moshi_ttt.serving.metrics import ServerMetrics
from moshi_ttt.serving.protocol import Greeting, ProtocolError, message, metadata, reason
from moshi_ttt.serving.sessions import CallerSession, NoRowError, Sessions

_log = logging.getLogger("moshi_ttt.serving")

OUT_QUEUE = 25
"""Messages that wait for a client to read: two seconds."""
CLOSE_SEC = 2.0
"""How long a client may take to answer the closing of its connection."""
MESSAGES_PER_SEC = 400.0
"""Messages a client may send, with a burst of two seconds: ten times what Moshi's clients do at ten times the speed."""


@dataclass(frozen=True)
class Service:
    """What all connections share.

    Attributes:
        text_of: what a text token says; None for one that says nothing.
        new_seed: the seed of a client that names none.
        encoding: whose turn it is. Opus holds the interpreter for a millisecond a frame, in any thread.
    """

    engine: Engine
    sessions: Sessions
    metrics: ServerMetrics
    text_of: Callable[[int], str | None]
    new_seed: Callable[[], int]
    rate: int
    frame_size: int
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)


class Connection:
    """A client that has passed the checks of ``access``. ``run`` lasts as long as it is there."""

    def __init__(
        self, ws: web.WebSocketResponse, greeting: Greeting, service: Service, abort: Callable[[], None]
    ) -> None:  # fmt: skip
        self.session: CallerSession | None = None
        self.closed = asyncio.Event()
        self._ws, self._greeting, self._service, self._abort = ws, greeting, service, abort
        self._in, self._out = codecs(greeting.audio, service.rate, service.metrics)
        self._framer = Framer(service.frame_size)
        self._queue: asyncio.Queue[bytes | SlotOutput] = asyncio.Queue(OUT_QUEUE)
        self._commands = ClientCommands(self)
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        self._may_come_back = True
        self._allowed, self._counted = 2 * MESSAGES_PER_SEC, time.monotonic()

    @property
    def extension(self) -> bool:
        return self._greeting.extension

    @property
    def closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._ending is not None or self._ws.closed

    async def run(self) -> None:
        """Until the client goes away, or ``end`` is called."""
        for work in (self._send(), self._admit()):
            self._start(work)
        try:
            await self._receive()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._ending is not None:
                await self._ending
            if self.session is not None:
                gone = not self._may_come_back or self._ws.close_code == protocol.DONE
                self._service.sessions.lost(self.session, may_come_back=self.extension and not gone)
            self.closed.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    # ---- the way in

    async def _admit(self) -> None:
        sessions, greeting, session = self._service.sessions, self._greeting, None
        try:
            if greeting.resume is not None:
                session = sessions.resume(greeting.resume, self)
            resumed = session is not None
            if session is None:
                told = self._tell_place if self.extension else None
                session = await sessions.begin(greeting.settings, told)
        except NoRowError as error:
            self.end(protocol.GOING_AWAY if sessions.closing else protocol.FULL, str(error))
            return
        except EngineStoppedError as error:
            self.end(protocol.FAILED, str(error))
            return
        except MoshiTTTError as error:
            self.end(protocol.REFUSED, str(error))
            return
        session.connection = self
        self.session = session  # from here on, the end of this connection is the end of the session, or a loss
        self.post(message(protocol.HANDSHAKE))
        if self.extension:
            self.post(
                metadata(
                    "session", session=session.name, resume=session.secret, resumed=resumed, owner=session.owner,
                    updates=session.settings.updates, volume=session.settings.volume, frames=session.line.frames,
                )
            )  # fmt: skip
            self._start(self._tell_stats())
        self._start(self._commands.run())

    def _tell_place(self, place: int) -> None:
        self.post(metadata("queue", position=place))

    async def _receive(self) -> None:
        async for received in self._ws:
            if received.type != aiohttp.WSMsgType.BINARY:
                self.end(protocol.NOT_AUDIO, "Messages here are binary: a tag, then Ogg with Opus or UTF-8.")
            elif self._too_many():
                self.end(protocol.REFUSED, f"More than {MESSAGES_PER_SEC:g} messages a second.")
            elif received.data and self._ending is None:
                try:
                    self._take(received.data[0], received.data[1:])
                except NotAudioError as error:
                    self.end(protocol.NOT_AUDIO, str(error))
                except TooMuchAudioError as error:
                    self.end(protocol.TOO_BIG, str(error))
                except ProtocolError as error:
                    self.complain(str(error))

    def _too_many(self) -> bool:
        now = time.monotonic()
        self._allowed = min(2 * MESSAGES_PER_SEC, self._allowed + (now - self._counted) * MESSAGES_PER_SEC)
        self._counted = now
        self._allowed -= 1
        return self._allowed < 0

    def _take(self, tag: int, payload: bytes) -> None:
        """One message. Tags that a client may not send are ignored, as Moshi's own server does."""
        session = self.session
        if tag == protocol.AUDIO:
            samples = self._in.decode(payload)
            if session is not None and not session.paused:
                for frame in self._framer.frames(samples):
                    self._service.metrics.dropped.inc(self._service.engine.offer(session.line, frame))
        elif tag == protocol.CONTROL and payload[:1] == bytes([protocol.RESTART]) and session is not None:
            self._commands.put({"type": "restart"})
        elif tag == protocol.METADATA and self.extension:
            self._commands.put(protocol.read_json(payload))

    # ---- the way out

    def post(self, data: bytes | SlotOutput) -> None:
        """Queue a message. A client that has not read the last ones is closed."""
        if self._ending is not None:
            return
        try:
            self._queue.put_nowait(data)
        except asyncio.QueueFull:
            words = f"You do not read: {OUT_QUEUE} messages wait for you."
            self.end(protocol.REFUSED, words, may_come_back=True)  # or the network was away

    def say(self, output: SlotOutput) -> None:
        """Queue what Moshi says: encoded when its turn comes."""
        self.post(output)

    def complain(self, words: str) -> None:
        """Tell a client in words that something it asked for was not done."""
        self.post(message(protocol.ERROR, words.encode()))

    async def _send(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went away: the receiver sees it too
            while True:
                data = await self._queue.get()
                if isinstance(data, bytes):
                    await self._ws.send_bytes(data)
                    continue
                async with self._service.encoding:
                    encoded = self._out.encode(data.pcm)
                    await asyncio.sleep(0)  # a tick's answers come at once: the loop does others' work between them
                if encoded:
                    await self._ws.send_bytes(message(protocol.AUDIO, encoded))
                if text := self._service.text_of(int(data.tokens[0])):
                    await self._ws.send_bytes(message(protocol.TEXT, text.encode()))

    async def _tell_stats(self) -> None:
        while (session := self.session) is not None:
            await asyncio.sleep(self._service.engine.stats_every_sec)
            try:
                sites = await session.stats()
            except EngineStoppedError:
                return
            line = session.line
            self.post(
                metadata(
                    "stats", frames=line.frames, queued=len(line.queue), dropped=line.dropped,
                    delay_ms=round(1000 * line.delay_sec, 1), tick_ms=round(1000 * self._service.engine.tick_sec, 1),
                    updates=session.settings.updates, volume=session.settings.volume, sites=sites,
                )
            )  # fmt: skip

    def end(self, code: int, words: str, *, last: Sequence[bytes] = (), may_come_back: bool = False) -> None:
        """Close with a code and its reason, after the words as a message, also where the client reads nothing."""
        if self._ending is None:
            self._may_come_back = may_come_back
            self._ending = asyncio.get_running_loop().create_task(self._close(code, words, last))

    async def _close(self, code: int, words: str, last: Sequence[bytes]) -> None:
        for task in self._tasks[:1]:
            task.cancel()  # the sender: it may be stuck

        async def goodbye() -> None:
            for data in (*last, message(protocol.ERROR, words.encode())):
                await self._ws.send_bytes(data)
            await self._ws.close(code=code, message=reason(words))

        try:
            await asyncio.wait_for(goodbye(), CLOSE_SEC)
        except (asyncio.TimeoutError, ConnectionError, RuntimeError):
            _log.debug("a client did not take the closing of its connection")
        finally:
            self._abort()
            session = None if self.session is None else self.session.name
            _log.info("connection ended", extra={"fields": {"session": session, "code": code}})
