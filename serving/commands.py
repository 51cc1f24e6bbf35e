"""What a client that speaks our messages can ask for, one after the other: JSON in, JSON out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from moshi_ttt.core.errors import MoshiTTTError, nearest
from moshi_ttt.hosts.moshi.row_state import RowKind
from moshi_ttt.serving.engine import EngineStoppedError
from moshi_ttt.serving.memory_store import OWNER_ID
from moshi_ttt.serving.protocol import ProtocolError, metadata
from moshi_ttt.serving.sessions import CallerSession

if TYPE_CHECKING:
    from moshi_ttt.serving.connection import Connection

COMMANDS_WAITING = 8
"""ClientCommands that wait for their turn; more are refused."""
Reply = dict[str, Any]


class ClientCommands:
    """The commands of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(COMMANDS_WAITING)

    def put(self, values: dict[str, Any]) -> None:
        """Raises ProtocolError where too many wait, or nothing can be asked for yet."""
        if self._connection.session is None:
            raise ProtocolError("Ask when you have a place: after the handshake.")
        try:
            self._queue.put_nowait(values)
        except asyncio.QueueFull:
            raise ProtocolError(f"{COMMANDS_WAITING} of your requests wait already.") from None

    async def run(self) -> None:
        while True:
            values = await self._queue.get()
            session = self._connection.session
            if session is None:
                return
            named = {"id": values["id"]} if isinstance(values.get("id"), int) else {}
            try:
                reply = await perform(session, values)
            except EngineStoppedError:
                return
            except MoshiTTTError as error:
                if self._connection.extension:
                    of = str(values["type"])[:40]
                    self._connection.post(metadata("error", of=of, message=str(error), **named))
                else:
                    self._connection.complain(str(error))
                continue
            if self._connection.extension:
                self._connection.post(metadata(**reply, **named))


async def perform(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    """Do what ``values`` ask for, and say what was done. Raises MoshiTTTError, in words for the client."""
    kind = values["type"]
    if kind not in _COMMANDS:
        raise ProtocolError(f"There is no request {kind[:40]!r}. {nearest(kind[:40], _COMMANDS)}")
    return await _COMMANDS[kind](session, values)


async def _owner(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    owner = values.get("owner")
    if not isinstance(owner, str) or not OWNER_ID.fullmatch(owner):
        raise ProtocolError("An owner's id is 32 hexadecimal digits, as the server made it.")
    session.owner = owner
    return {"kind": "owner", "owner": owner}


async def _save(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    kind: RowKind = values.get("what", "memory")
    if kind not in get_args(RowKind):
        raise ProtocolError('Say "what": memory or session.')
    stored, loss = await session.save(kind)
    return {"kind": "saved", "memory": stored, "loss": loss}


async def _list(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    return {"kind": "memories", "memories": await session.memories()}


async def _restore(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    name = _name(values)
    return {"kind": "restored", "name": name, "what": await session.restore(name)}


async def _delete(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    name = _name(values)
    await session.delete(name)
    return {"kind": "deleted", "name": name}


async def _forget(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    await session.forget()
    return {"kind": "forgotten"}


async def _restart(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    await session.restart()
    return {"kind": "restarted"}


async def _learning(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    enabled = _switch(values)
    await session.set_updates(enabled)
    return {"kind": "learning", "enabled": enabled}


async def _volume(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    value = values.get("value")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProtocolError('A volume has a number as its "value".')
    await session.set_volume(float(value))
    return {"kind": "volume", "value": float(value)}


async def _keep(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    session.set_keep(_switch(values))
    return {"kind": "keep", "enabled": session.keep}


async def _pause(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    session.paused = True
    return {"kind": "paused"}


async def _resume(session: CallerSession, values: Mapping[str, Any]) -> Reply:
    session.paused = False
    return {"kind": "resumed"}


def _name(values: Mapping[str, Any]) -> str:
    name = values.get("name")
    if not isinstance(name, str):
        raise ProtocolError('Say which memory, by its "name".')
    return name


def _switch(values: Mapping[str, Any]) -> bool:
    enabled = values.get("enabled")
    if not isinstance(enabled, bool):
        raise ProtocolError('Say "enabled": true or false.')
    return enabled


_COMMANDS: Mapping[str, Callable[[CallerSession, Mapping[str, Any]], Awaitable[Reply]]] = {
    "owner": _owner, "save": _save, "list": _list, "restore": _restore, "delete": _delete, "forget": _forget,
    "restart": _restart, "learning": _learning, "volume": _volume, "keep": _keep, "pause": _pause, "resume": _resume,
}  # fmt: skip
