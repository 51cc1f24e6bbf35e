"""Connections that send half a request, none, or one slowly: each is closed in its time, and others are undisturbed."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import time

import pytest

from moshi_ttt.serving.http import HttpOptions
from moshi_ttt.serving.server import ServerOptions, tls_context

from .client import PATIENCE, site
from .fakes import FakeSlots
from .test_faults import descriptors, undisturbed

SECONDS = 0.4
UPGRADE = (
    b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
HALVES = {
    "nothing": b"",
    "a byte": b"G",
    "half a line": b"GET /api/health HT",
    "half the headers": b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nX-A",
    "half an upgrade": UPGRADE,
    "blank lines": b"\r\n\r\n",
}


def run(work, patience=90):
    asyncio.run(asyncio.wait_for(work, patience))


def options(**changes):
    return ServerOptions(http=HttpOptions(**{"request_sec": SECONDS, **changes}))


async def figures(here):
    async with here.http.get(f"{here.base}/metrics") as answer:
        text = await answer.text()
    return {name: float(value) for name, value in re.findall(r"^moshi_ttt_(\w*idle\w*) (\S+)$", text, re.MULTILINE)}


async def closed_after(reader, begun):
    """Seconds until the server closed a connection on which it said nothing."""
    try:
        said = await asyncio.wait_for(reader.read(), PATIENCE)
    except ConnectionError:
        said = b""
    assert said == b"" or said.startswith(b"HTTP/1.1 400"), said
    return time.monotonic() - begun


@pytest.mark.parametrize("half", HALVES)
def test_half_a_request_is_closed_at_its_deadline(half):
    async def work():
        async with site(FakeSlots(), options()) as here:

            async def fault():
                begun = time.monotonic()
                reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
                writer.write(HALVES[half])
                assert await closed_after(reader, begun) >= SECONDS * 0.9
                writer.close()

            await undisturbed(here, fault)
            assert (await figures(here))["closed_idle_connections_total"] >= 1

    run(work())


def test_a_request_that_drips_is_closed_although_it_never_pauses():
    async def work():
        async with site(FakeSlots(), options()) as here:
            begun = time.monotonic()
            reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
            ended = asyncio.ensure_future(closed_after(reader, begun))
            for byte in UPGRADE + b"X-Long: " + b"a" * 10_000:
                if ended.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.wait([ended], timeout=0.01)
            assert SECONDS * 0.9 <= await ended < 10_000 * 0.01
            writer.close()

    run(work())


def test_many_slow_requests_at_once_leave_nothing_behind():
    async def work():
        async with site(FakeSlots(), options(idle=40)) as here:
            before = descriptors()

            async def fault():
                pairs = [await asyncio.open_connection("127.0.0.1", here.server.port) for _ in range(120)]
                for _, writer in pairs:
                    writer.write(b"GET / HTTP/1.1\r\nHost: ")
                assert (await figures(here))["idle_connections"] <= 40
                await asyncio.gather(*(closed_after(reader, 0) for reader, _ in pairs))
                for _, writer in pairs:
                    writer.close()

            await undisturbed(here, fault)
            for _ in range(int(PATIENCE / 0.05)):
                if descriptors() <= before + 4:
                    break
                await asyncio.sleep(0.05)
            now = await figures(here)
            assert descriptors() <= before + 4
            assert 120 <= now["closed_idle_connections_total"] <= 123, "and those of this test itself"
            assert now["idle_connections"] <= 3, "the connection that asked, and the caller's"

    run(work())


def test_a_connection_that_is_kept_open_after_an_answer_is_closed():
    async def work():
        async with site(FakeSlots(), options()) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
            for _ in range(3):  # each answer gives it time for the next request
                writer.write(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert (await reader.readuntil(b'"waiting": 0}')).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(SECONDS / 2)
            begun = time.monotonic()
            assert await reader.read() == b""
            assert time.monotonic() - begun < PATIENCE
            writer.close()

    run(work())


def test_a_conversation_outlasts_the_deadline():
    async def work():
        async with site(FakeSlots(), options(request_sec=0.1)) as here:
            client = await (await here.extended()).started()
            await asyncio.sleep(0.4)
            assert (await client.ask("pause"))["type"] == "paused"
            assert client.ws.close_code is None

    run(work())


def test_a_tls_handshake_that_is_never_finished_is_closed(tmp_path):
    names = ["-subj", "/CN=localhost", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run(command, check=True, capture_output=True)
    context = tls_context(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def work():
        async with site(FakeSlots(), ServerOptions(tls=context, http=HttpOptions(request_sec=SECONDS))) as here:
            silent = [await asyncio.open_connection("127.0.0.1", here.server.port) for _ in range(5)]
            silent[1][1].write(b"\x16\x03\x01\x02\0\x01")  # the beginning of a client's first message
            known = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            known.check_hostname, known.verify_mode = False, ssl.CERT_NONE
            silent += [await asyncio.open_connection("127.0.0.1", here.server.port, ssl=known)]  # and no request
            begun = time.monotonic()
            for reader, writer in silent:
                await closed_after(reader, begun)
                writer.close()
            await (await here.extended()).started()

    run(work())
