"""A client of the server under test, and the server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
import numpy as np
import sphn

from moshi_ttt.serving.server import ServerOptions, bound_socket, running

FRAME, RATE = 1920, 24_000
PATIENCE = 20.0
"""Seconds that anything may take here: other work may hold the cores."""


def text_of(token):
    return f"<{token}>"


class Client:
    """One WebSocket, and everything that came."""

    def __init__(self, ws):
        self.ws = ws
        self.audio, self.texts, self.json, self.errors, self.tags = [], [], [], [], []
        self.changed = asyncio.Condition()
        self.reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self):
        async for received in self.ws:
            assert received.type == aiohttp.WSMsgType.BINARY, received
            tag, payload = received.data[0], received.data[1:]
            self.tags.append(tag)
            if tag == 1:
                self.audio.append(payload)
            elif tag == 2:
                self.texts.append(payload.decode())
            elif tag == 4:
                self.json.append(json.loads(payload))
            elif tag == 5:
                self.errors.append(payload.decode())
            async with self.changed:
                self.changed.notify_all()
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition, patience=PATIENCE):
        async def wait():
            async with self.changed:
                await self.changed.wait_for(lambda: condition() or self.reader.done())

        await asyncio.wait_for(wait(), patience)
        assert condition(), (self.tags[-5:], self.json[-3:], self.errors, self.ws.close_code)

    async def started(self):
        await self.until(lambda: 0 in self.tags)
        return self

    async def closed(self, patience=PATIENCE):
        await asyncio.wait_for(asyncio.shield(self.reader), patience)
        return self.ws.close_code

    def of(self, kind):
        return [each for each in self.json if each["type"] == kind]

    async def ask(self, kind, **fields):
        """Send a request and return the answer to it."""
        number = len(self.json) + 1000 * len(self.tags) + 1
        await self.ws.send_bytes(b"\x04" + json.dumps({"type": kind, "id": number, **fields}).encode())
        await self.until(lambda: any(each.get("id") == number for each in self.json))
        return next(each for each in self.json if each.get("id") == number)

    async def say_pcm(self, samples):
        for start in range(0, len(samples), FRAME):
            values = (np.clip(samples[start : start + FRAME], -1, 1) * 32767).round().astype("<i2")
            await self.ws.send_bytes(b"\x01" + values.tobytes())

    async def say_slowly(self, samples, pause=0.0):
        """A frame at a time, each once the one before was answered, so that none is dropped."""
        for start in range(0, len(samples), FRAME):
            before = len(self.audio)
            await self.say_pcm(samples[start : start + FRAME])
            if start >= 2 * FRAME or before:
                await self.until(lambda before=before: len(self.audio) > before)
            else:
                await asyncio.sleep(0.05)


class Opus:
    def __init__(self):
        self.writer, self.reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)

    def page(self, samples):
        return b"\x01" + bytes(self.writer.append_pcm(np.ascontiguousarray(samples, np.float32)))


class Site:
    """A running server and its clients."""

    def __init__(self, server, http, base):
        self.server, self.http, self.base = server, http, base
        self.clients = []

    async def connect(self, query="", **options):
        client = Client(await self.http.ws_connect(f"{self.base}/api/chat?{query}", autoping=True, **options))
        self.clients.append(client)
        return client

    async def extended(self, query="format=pcm_s16", **options):
        return await self.connect(f"protocol=moshi-ttt.1&{query}", **options)

    async def counts(self, **expected):
        """The use of rows, once it is as expected: what ends, ends in the background."""
        for _ in range(int(PATIENCE / 0.02)):
            now = self.server.sessions.counts
            if all(now[key] == value for key, value in expected.items()):
                return now
            await asyncio.sleep(0.02)
        raise AssertionError(self.server.sessions.counts)


@contextlib.asynccontextmanager
async def site(slots, options=None):
    with bound_socket("127.0.0.1", 0) as listening:
        async with running(slots, text_of, listening, options or ServerOptions()) as server:
            scheme = "https" if options is not None and options.tls else "http"
            connector = aiohttp.TCPConnector(ssl=False, limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                here = Site(server, http, f"{scheme}://127.0.0.1:{server.port}")
                try:
                    yield here
                finally:
                    for client in here.clients:
                        if not client.ws.closed:
                            await client.ws.close()
                        client.reader.cancel()
                    await asyncio.gather(*(each.reader for each in here.clients), return_exceptions=True)
