"""Who has which row: sessions, the line of those who wait for a row, and sessions whose connection was lost.

Everything here runs on the event loop; what touches the model goes through the engine.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.hosts.moshi.row_state import RowKind, RowState
from moshi_ttt.hosts.moshi.slots import SiteStats, SlotOutput, SlotSettings
from moshi_ttt.serving.engine import Engine, EngineStoppedError, Line
from moshi_ttt.serving.memory_store import MemoryStore, MemoryStoreError, StoredMemory, new_owner
from moshi_ttt.serving.metrics import ServerMetrics
from moshi_ttt.serving.protocol import GOING_AWAY, REFUSED, metadata

if TYPE_CHECKING:
    from moshi_ttt.serving.connection import Connection

_log = logging.getLogger("moshi_ttt.serving")
HOUSEKEEPING_SEC = 1.0


NO_ROW = "All places are taken. Try again later."


class NoRowError(MoshiTTTError, RuntimeError):
    """No row is free, and the client does not wait, or too many do."""


def _refuse(granted: asyncio.Future[int], words: str = NO_ROW) -> None:
    if not granted.done():
        granted.set_exception(NoRowError(words))


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """How long, and how many.

    Attributes:
        waiting: clients that wait for a row.
        leaving_sec: how long a client that cannot be told its place waits for a row that is being given back.
        resume_sec: how long the row of a lost connection is kept for it.
        idle_sec: how long a client may have a row without sending sound.
        session_sec: how long a session lasts. Beyond a day, positions are no longer exact in float32.
    """

    waiting: int = 32
    leaving_sec: float = 2.0
    resume_sec: float = 30.0
    idle_sec: float = 300.0
    session_sec: float = 24 * 3600.0


class CallerSession:
    """A row that belongs to a caller, from the handshake to the end; a lost connection may come back to it.

    Attributes:
        name: for logs. It says nothing about the caller, and opens nothing.
        secret: who knows it may continue the session.
        owner: the secret id under which memories are kept.
        keep: whether the memory is saved when the session ends, however it ends.
        connection: None while it is lost.
    """

    def __init__(self, engine: Engine, row: int, settings: SlotSettings, store: MemoryStore | None) -> None:
        self.name, self.secret, self.owner = secrets.token_hex(4), secrets.token_urlsafe(24), new_owner()
        self.settings, self.keep, self.paused = settings, False, False
        self.connection: Connection | None = None
        self.begun = time.monotonic()
        self.lost_at: float | None = None
        self.ended = False
        self._engine, self._store = engine, store
        self.line = Line(row=row, answered=self._answered, last_frame=time.perf_counter())

    @property
    def leaves(self) -> bool:
        """Whether its row is being given back, or its connection is closing."""
        return self.ended or (self.connection is not None and self.connection.closing)

    def _answered(self, output: SlotOutput) -> None:
        if self.connection is not None:
            self.connection.say(output)

    async def join(self, state: RowState | None = None) -> None:
        await asyncio.wrap_future(self._engine.join(self.line, self.settings, state))

    async def save(self, kind: RowKind) -> tuple[StoredMemory, float]:
        """Raises MemoryStoreError where it cannot be kept."""
        store, row = self._required_store(), self.line.row
        state = await asyncio.wrap_future(self._engine.submit(lambda slots: slots.save_row(row, kind)))
        return await asyncio.to_thread(store.save, self.owner, state)

    async def restore(self, name: str) -> RowKind:
        """Begin anew with a memory, or continue a kept session. Raises MemoryStoreError and HostError."""
        state = await asyncio.to_thread(self._required_store().load, self.owner, name)
        await self.join(state)
        return state.kind

    async def memories(self) -> list[StoredMemory]:
        return await asyncio.to_thread(self._required_store().listed, self.owner)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._required_store().delete, self.owner, name)

    async def forget(self) -> None:
        await asyncio.wrap_future(self._engine.submit(lambda slots: slots.forget(self.line.row)))

    async def restart(self) -> None:
        await asyncio.wrap_future(self._engine.submit(lambda slots: slots.restart(self.line.row)))

    async def set_updates(self, enabled: bool) -> None:
        await asyncio.wrap_future(self._engine.submit(lambda slots: slots.set_updates(self.line.row, enabled)))
        self.settings = replace(self.settings, updates=enabled)

    async def set_volume(self, volume: float) -> None:
        """Raises HostError for a volume that is not allowed."""
        await asyncio.wrap_future(self._engine.submit(lambda slots: slots.set_volume(self.line.row, volume)))
        self.settings = replace(self.settings, volume=volume)

    def set_keep(self, enabled: bool) -> None:
        """Whether the memory is saved when the session ends. Raises MemoryStoreError where none is kept."""
        self._required_store()
        self.keep = enabled

    async def stats(self) -> list[SiteStats]:
        return await asyncio.wrap_future(self._engine.stats(self.line))

    def _required_store(self) -> MemoryStore:
        if self._store is None:
            raise MemoryStoreError("This server keeps no memories. It was started without --memories.")
        return self._store


class Sessions:
    """All sessions of a server, and the line of those who wait."""

    def __init__(
        self, engine: Engine, rows: int, limits: SessionLimits, metrics: ServerMetrics, store: MemoryStore | None
    ) -> None:  # fmt: skip
        self.limits, self.closing = limits, False
        self._engine, self._metrics, self._store = engine, metrics, store
        self._free = deque(range(rows))
        self._sessions: dict[str, CallerSession] = {}
        self._waiting: deque[tuple[asyncio.Future[int], Callable[[int], None] | None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        metrics.watch("free", lambda: len(self._free))
        metrics.watch("taken", lambda: len(self._sessions))
        metrics.watch("waiting", lambda: len(self._waiting))

    @property
    def counts(self) -> dict[str, int]:
        return {"free": len(self._free), "taken": len(self._sessions), "waiting": len(self._waiting)}

    async def begin(self, settings: SlotSettings, told: Callable[[int], None] | None) -> CallerSession:
        """A session in a free row. Where there is none, wait for one if ``told`` can tell the place in the line.

        A client that cannot be told waits only for a row that is being given back, and for ``leaving_sec`` at most: who
        leaves and comes again at once finds its place. Raises NoRowError, and EngineStoppedError.
        """
        row = await self._row(told)
        session = CallerSession(self._engine, row, settings, self._store)
        self._sessions[session.secret] = session
        try:
            await session.join()
        except BaseException:
            self.end(session)
            raise
        self._metrics.sessions.inc()
        _log.info("session began", extra={"fields": {"session": session.name, "row": row}})
        return session

    async def _row(self, told: Callable[[int], None] | None) -> int:
        if self._free and not self._waiting:
            return self._free.popleft()
        comes = told is not None or self._leaving > len(self._waiting)
        if not comes or len(self._waiting) >= self.limits.waiting or self.closing:
            raise NoRowError(NO_ROW)
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[int] = loop.create_future()
        entry = (granted, told)
        self._waiting.append(entry)
        deadline = None
        if told is not None:
            told(len(self._waiting))
        else:
            deadline = loop.call_later(self.limits.leaving_sec, _refuse, granted)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # the row came and the client went at the same time
                self._give_back(granted.result())
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._tell_places()

    @property
    def _leaving(self) -> int:
        """Rows whose callers are going away, so that they are soon free."""
        return sum(1 for session in self._sessions.values() if session.leaves)

    def _give_back(self, row: int) -> None:
        self._free.append(row)
        while self._free and self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                future.set_result(self._free.popleft())
        self._tell_places()

    def _tell_places(self) -> None:
        for place, (_, told) in enumerate(self._waiting, start=1):
            if told is not None:
                told(place)

    def resume(self, secret: str, connection: Connection) -> CallerSession | None:
        """The session of ``secret`` with a new connection, which takes the place of one that is still there."""
        session = self._sessions.get(secret)
        if session is None or session.ended:
            return None
        before, session.connection, session.lost_at = session.connection, connection, None
        if before is not None:
            before.session = None
            before.end(REFUSED, "This session goes on in another connection.")
        self._metrics.resumed.inc()
        return session

    def lost(self, session: CallerSession, *, may_come_back: bool) -> None:
        """The connection of a session is closed."""
        session.connection = None
        if may_come_back and self.limits.resume_sec > 0 and not self.closing and self._engine.alive:
            session.lost_at = time.monotonic()
        else:
            self.end(session)

    def end(self, session: CallerSession) -> None:
        """End a session in the background: save what it asked for, and free its row."""
        if not session.ended:
            session.ended = True
            self.run(self._end(session))

    async def _end(self, session: CallerSession) -> None:
        try:
            await self._save_last(session)
            await asyncio.wrap_future(self._engine.leave(session.line))
        except EngineStoppedError:
            pass  # there is no row to leave
        finally:
            self._sessions.pop(session.secret, None)
            self._give_back(session.line.row)
            fields = {"session": session.name, "frames": session.line.frames, "dropped": session.line.dropped}
            _log.info("session ended", extra={"fields": fields})

    async def _save_last(self, session: CallerSession) -> StoredMemory | None:
        if not session.keep or not self._engine.alive:
            return None
        session.keep = False
        try:
            stored, _ = await session.save("memory")
        except MoshiTTTError as error:
            _log.warning("memory not kept", extra={"fields": {"session": session.name, "error": str(error)}})
            return None
        self._metrics.memories.labels(action="saved").inc()
        return stored

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run in the background, to the end: a client that goes away does not cancel it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def keep_house(self) -> None:
        """End what lasts too long, for as long as the server runs."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_SEC)
            for session in list(self._sessions.values()):
                self._check_time(session)

    def _check_time(self, session: CallerSession) -> None:
        now, limits = time.monotonic(), self.limits
        if session.lost_at is not None and now - session.lost_at > limits.resume_sec:
            self.end(session)
            return
        words = None
        if now - session.begun > limits.session_sec:
            words = f"A session lasts {limits.session_sec / 3600:g} hours at most."
        elif time.perf_counter() - session.line.last_frame > limits.idle_sec:
            words = f"No sound came for {limits.idle_sec:g} seconds."
        if words is not None and session.connection is not None:
            session.connection.end(GOING_AWAY, words)
        elif words is not None:
            self.end(session)

    async def close(self, code: int, words: str) -> None:
        """End all sessions: save what was asked for, say goodbye, and wait until the rows are free."""
        self.closing = True
        while self._waiting:
            _refuse(self._waiting.popleft()[0], words)
        await asyncio.gather(*(self._goodbye(session, code, words) for session in list(self._sessions.values())))
        while self._tasks:
            await asyncio.gather(*list(self._tasks), return_exceptions=True)

    async def _goodbye(self, session: CallerSession, code: int, words: str) -> None:
        stored = await self._save_last(session)
        if (connection := session.connection) is None:
            self.end(session)
            return
        connection.end(code, words, last=[] if stored is None else [metadata("saved", memory=stored, loss=None)])
        await connection.closed.wait()
