"""The HTTP side: the WebSocket, the page, health, facts and figures."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import hdrs, web

from moshi_ttt.serving import protocol
from moshi_ttt.serving.access import AccessRules, subprotocols
from moshi_ttt.serving.connection import CLOSE_SEC, Connection, Service
from moshi_ttt.serving.idle import IdleConnections
from moshi_ttt.serving.protocol import EXTENSION, MESSAGE_BYTES, ProtocolError, message, read_query, reason

_log = logging.getLogger("moshi_ttt.serving")

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
}  # fmt: skip
"""Of the page's files. A system's own table may call a script plain text, and browsers would not run it."""
REQUEST_BYTES = 4096
"""The largest body of a request: none has one."""
SEND_BUFFER = 64 * 1024
"""Bytes that the system keeps for a client that does not read, about ten seconds of Opus."""


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """How connections are kept.

    Attributes:
        connections: WebSockets at a time, those that wait or are refused included.
        heartbeat_sec: between two WebSocket pings. A client has half of it to answer.
        request_sec: for a TLS handshake, for a request to come whole, and between an answer and the next request.
        idle: connections without a whole request, at a time; a further one closes the one that has waited longest.
    """

    connections: int = 256
    heartbeat_sec: float = 60.0
    request_sec: float = 10.0
    idle: int = 256


class HttpService:
    """The routes of one server."""

    def __init__(
        self, service: Service, access: AccessRules, facts: Mapping[str, Any], options: HttpOptions | None = None
    ) -> None:  # fmt: skip
        self._service, self._access, self._facts = service, access, facts
        self._options = options or HttpOptions()
        self._open = 0
        self.idle = IdleConnections(self._options.request_sec, self._options.idle, service.metrics)
        self._page = static_files()
        service.metrics.watch("open", lambda: self._open)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._answer, _answer_safely], client_max_size=REQUEST_BYTES)
        app.router.add_get("/", self._index)
        app.router.add_get("/api/health", self._health)
        app.router.add_get("/api/info", self._known(self._info))
        app.router.add_get("/metrics", self._known(self._metrics))
        app.router.add_get("/api/chat", self._chat)
        app.router.add_get("/{name}", self._static)  # beside the page, as where Moshi's own server shows a page
        return app

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        with self.idle.answering(request.protocol):
            return await handler(request)

    def _known(
        self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """``handler`` for those who may connect."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            if (words := self._access.refusal(request)) is not None:
                raise web.HTTPForbidden(text=words)
            return await handler(request)

        return guarded

    # ---- pages

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return self._file("index.html")

    async def _static(self, request: web.Request) -> web.StreamResponse:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        """A file of the page, from memory: nothing that is asked for becomes a path."""
        if name not in self._page:
            raise web.HTTPNotFound(text="There is no such file.")
        return web.Response(body=self._page[name], content_type=TYPES[Path(name).suffix], charset="utf-8")

    async def _health(self, request: web.Request) -> web.StreamResponse:
        alive = self._service.engine.alive and not self._service.sessions.closing
        values = {"ok": alive, "slots": self._service.engine.slots.count, **self._service.sessions.counts}
        return web.json_response(values, status=200 if alive else 503)

    async def _info(self, request: web.Request) -> web.StreamResponse:
        slots = self._service.engine.slots
        return web.json_response(
            {
                "protocol": EXTENSION, "slots": slots.count, "sample_rate": slots.sample_rate,
                "frame_rate": slots.frame_rate, "frame_size": slots.frame_size, **self._facts,
            }
        )  # fmt: skip

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=self._service.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    # ---- the conversation

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        offered = subprotocols(request)
        if offered and EXTENSION not in offered:
            raise web.HTTPBadRequest(text=f"The subprotocol here is {EXTENSION}.")
        if self._open >= self._options.connections:
            raise web.HTTPServiceUnavailable(text="Too many connections.")
        ws = web.WebSocketResponse(
            heartbeat=self._options.heartbeat_sec, max_msg_size=MESSAGE_BYTES, timeout=CLOSE_SEC, compress=False,
            protocols=(EXTENSION,),
        )  # fmt: skip
        await ws.prepare(request)
        self._service.metrics.connections.inc()
        self._open += 1
        try:
            await self._talk(request, ws)
        finally:
            self._open -= 1
            self._service.metrics.closed.labels(code=str(ws.close_code)).inc()
        return ws

    async def _talk(self, request: web.Request, ws: web.WebSocketResponse) -> None:
        _limit_send_buffer(request)

        def abort() -> None:
            if request.transport is not None:
                request.transport.abort()

        words, kind = self._access.refusal(request), "access"
        if words is None:
            try:
                greeting = read_query(request.query, seed=self._service.new_seed())
            except ProtocolError as error:
                words, kind = str(error), "query"
            else:
                await Connection(ws, greeting, self._service, abort).run()
        if words is not None:
            _log.info("connection refused", extra={"fields": {"code": protocol.REFUSED, "because_of": kind}})
            try:
                await ws.send_bytes(message(protocol.ERROR, words.encode()))
                await ws.close(code=protocol.REFUSED, message=reason(words))
            except ConnectionError:
                _log.debug("a client that was refused had gone")
            finally:
                abort()


def static_files() -> dict[str, bytes]:
    """The files of the page, by name."""
    folder = resources.files("moshi_ttt.serving") / "static"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in TYPES}


def _limit_send_buffer(request: web.Request) -> None:
    raw = None if request.transport is None else request.transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


@web.middleware
async def _answer_safely(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Headers for every answer; an error of ours is logged here, without what the request said."""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.headers.update(HEADERS)
        raise
    except (ConnectionError, TimeoutError):
        raise
    except Exception as error:
        _log.error("request failed", exc_info=error, extra={"fields": {"error": type(error).__name__}})
        raise web.HTTPInternalServerError(headers=HEADERS) from error
    if not response.prepared:
        response.headers.update({key: value for key, value in HEADERS.items() if key != hdrs.CONTENT_TYPE})
    return response
