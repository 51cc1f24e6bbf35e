"""Clients that break, lie or flood, and a model that fails: others are undisturbed, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import random
import socket
import ssl
import subprocess
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.serving.access import TOKEN_PREFIX, AccessRules, read_token, rules_for
from moshi_ttt.serving.http import HttpOptions
from moshi_ttt.serving.logs import LOGGER, log_as_json
from moshi_ttt.serving.memory_store import MemoryStore
from moshi_ttt.serving.server import ServeError, ServerOptions, bound_socket, serve, tls_context
from moshi_ttt.serving.sessions import SessionLimits

from .client import FRAME, Opus, site, text_of
from .fakes import FakeSlots

TOKEN = "a-token-that-nobody-guesses"


def tone(frames, value=0.25):
    return np.full(frames * FRAME, value, np.float32)


def run(work, patience=60):
    asyncio.run(asyncio.wait_for(work, patience))


def descriptors():
    return len(os.listdir("/dev/fd"))


async def undisturbed(here, fault):
    """Have somebody talk while ``fault`` happens; every frame must come back, and the rows must be free again."""
    caller = await (await here.extended()).started()
    talking = asyncio.ensure_future(caller.say_slowly(tone(30)))
    await fault()
    await talking
    heard = np.frombuffer(b"".join(caller.audio), "<i2") / 32767
    assert len(heard) >= 25 * FRAME
    assert np.allclose(heard, 0.25, atol=1e-3)
    assert caller.ws.close_code is None
    await caller.ws.close()
    await here.counts(taken=0, waiting=0)


# ---- what clients send


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\x01" + b"no page of sound, but long enough to be taken for one", 1003),
        (b"\x01" + bytes(70_000), 1009),
        ("text", 1003),
        (b"\x05error", None),
        (b"\xffwhat", None),
        (b"", None),
        (b"\x03", None),
        (b"\x03\xff", None),
        (b"\x04{", None),
    ],
)
def test_a_bad_message(message, code):
    async def work():
        async with site(FakeSlots()) as here:

            async def fault():
                client, opus = await (await here.connect()).started(), Opus()
                await (client.ws.send_str if isinstance(message, str) else client.ws.send_bytes)(message)
                if code is not None:
                    assert await client.closed() == code
                    return
                for _ in range(6):
                    await client.ws.send_bytes(opus.page(tone(1)))
                    await asyncio.sleep(0.03)
                await client.until(lambda: client.audio)
                assert set(client.tags) <= {0, 1, 2}
                await client.ws.close()

            await undisturbed(here, fault)

    run(work())


def test_random_bytes():
    async def work():
        draw = random.Random(0)
        async with site(FakeSlots(count=3), ServerOptions(sessions=SessionLimits(resume_sec=0))) as here:

            async def fault():
                for number in range(30):
                    client = await here.connect("protocol=moshi-ttt.1" if number % 2 else "")
                    with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                        for _ in range(20):
                            await client.ws.send_bytes(draw.randbytes(draw.choice([1, 2, 40, 1000])))
                    client.ws._response.close()

            await undisturbed(here, fault)

    run(work())


def test_garbage_instead_of_http():
    async def work():
        async with site(FakeSlots()) as here:

            async def fault():
                for start in (
                    b"\x16\x03\x01\x02\0",
                    b"GET /api/chat HTTP/9.9\r\n\r\n",
                    b"\0" * 9000,
                    b"GET / HTTP/1.1\r\nA",
                ):
                    _, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
                    writer.write(start)
                    await writer.drain()
                    writer.close()

            await undisturbed(here, fault)

    run(work())


def test_a_sender_at_ten_times_real_time_and_one_that_floods():
    async def work():
        async with site(FakeSlots(count=3, tick_sec=0.01)) as here:

            async def fault():
                fast = await (await here.extended()).started()
                for _ in range(100):
                    await fast.say_pcm(tone(1))
                    await asyncio.sleep(0.008)
                assert fast.ws.close_code is None
                flood = await (await here.connect()).started()
                with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                    for _ in range(5000):
                        await flood.ws.send_bytes(b"\x06")
                assert await flood.closed() == 1008
                await fast.ws.close()

            await undisturbed(here, fault)

    run(work())


def test_a_burst_of_connections():
    async def work():
        options = ServerOptions(http=HttpOptions(connections=64), sessions=SessionLimits(waiting=8, resume_sec=0))
        async with site(FakeSlots(count=4), options) as here:

            async def one(number):
                try:
                    client = await here.connect("protocol=moshi-ttt.1" if number % 3 else "")
                    await asyncio.sleep(0.05)
                    await client.ws.close()
                except (aiohttp.WSServerHandshakeError, aiohttp.ClientConnectionError):
                    pass

            async def fault():
                await asyncio.gather(*(one(number) for number in range(200)))

            await undisturbed(here, fault)
            async with here.http.get(f"{here.base}/metrics") as answer:
                assert "moshi_ttt_open_connections 0.0" in await answer.text()

    run(work())


def test_a_client_that_does_not_read_is_closed():
    async def work():
        async with site(FakeSlots(count=2), ServerOptions(sessions=SessionLimits(resume_sec=0))) as here:
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", here.server.port))
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            headers = {
                "Host": "localhost", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "A" * 22 + "==",
            }  # fmt: skip
            lines = ["GET /api/chat?protocol=moshi-ttt.1&format=pcm_s16 HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            request = "\r\n".join([*lines, "", ""])
            await loop.sock_sendall(raw, request.encode())
            await here.counts(taken=1)

            async def fault():
                payload = b"\x01" + (tone(1) * 32767).astype("<i2").tobytes()
                header = b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4)  # masked with zeros
                with contextlib.suppress(ConnectionError):
                    for _ in range(2000):
                        await loop.sock_sendall(raw, header + payload)
                        await asyncio.sleep(0.002)
                        if not here.server.sessions.counts["taken"] or here.server.sessions.counts["free"]:
                            break

            await undisturbed(here, fault)
            raw.close()

    run(work())


def test_half_open_sockets_are_found():
    async def work():
        options = ServerOptions(http=HttpOptions(heartbeat_sec=0.4), sessions=SessionLimits(resume_sec=0))
        async with site(FakeSlots(count=2), options) as here:
            client = await here.connect(autoclose=False)
            client.reader.cancel()  # nobody answers a ping any more
            await here.counts(taken=1)
            await here.counts(taken=0)

    run(work())


def test_nothing_leaks():
    async def work():
        slots = FakeSlots(count=4)
        async with site(slots, ServerOptions(sessions=SessionLimits(resume_sec=0))) as here:

            async def round_of_faults():
                for number in range(12):
                    client = await here.extended()
                    if number % 4 == 0:
                        await client.ws.send_str("text")
                        await client.closed()
                    elif number % 4 == 1:
                        client.ws._response.connection.transport.abort()
                    elif number % 4 == 2:
                        await client.started()
                        await client.say_slowly(tone(3))
                    await client.ws.close()
                    client.reader.cancel()
                await here.counts(taken=0)
                here.clients.clear()
                await asyncio.sleep(0.1)

            await round_of_faults()
            before = descriptors(), len(asyncio.all_tasks())
            for _ in range(3):
                await round_of_faults()
            assert descriptors() <= before[0]
            assert len(asyncio.all_tasks()) <= before[1]
            assert slots.settings == {}

    run(work())


@pytest.mark.slow
def test_memory_is_flat_over_an_hour_of_frames():
    async def work():
        async with site(FakeSlots(count=4)) as here:
            callers = [await (await here.extended()).started() for _ in range(4)]

            async def talk(frames):
                for _ in range(frames // 4 // 50):
                    await asyncio.gather(*(caller.say_slowly(tone(50)) for caller in callers))
                    for caller in callers:
                        for kept in (caller.audio, caller.texts, caller.json, caller.tags):
                            del kept[:-1]

            await talk(4_000)
            before, tasks, files = resident(), len(asyncio.all_tasks()), descriptors()
            await talk(45_000)
            grown = resident() - before
            print(f"45,000 frames: {grown / 2**20:.2f} MiB more than after the first 4,000")
            assert grown < 4 * 2**20
            assert (len(asyncio.all_tasks()), descriptors()) == (tasks, files)

    run(work(), 3600)


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---- who may connect


def guarded(**options):
    return ServerOptions(access=AccessRules(token=TOKEN, hosts=None), **options)


def test_a_token_opens_by_header_and_by_subprotocol():
    async def work():
        async with site(FakeSlots(), guarded()) as here:
            await (await here.connect(headers={"Authorization": f"Bearer {TOKEN}"})).started()
            client = await here.connect(protocols=("moshi-ttt.1", TOKEN_PREFIX + TOKEN))
            await client.started()
            assert client.ws.protocol == "moshi-ttt.1", "the token is not sent back"
            for path in ("/api/info", "/metrics"):
                async with here.http.get(here.base + path) as answer:
                    assert answer.status == 403
                async with here.http.get(here.base + path, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
                    assert answer.status == 200
            for path in ("/", "/api/health"):
                async with here.http.get(here.base + path) as answer:
                    assert answer.status == 200

    run(work())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"headers": {"Authorization": "Bearer wrong"}},
        {"headers": {"Authorization": f"Basic {TOKEN}"}},
        {"headers": {"Authorization": f"Bearer {TOKEN}x"}},
        {"protocols": ("moshi-ttt.1", TOKEN_PREFIX + "wrong")},
        {"query": f"token={TOKEN}"},
    ],
)
def test_a_wrong_token_is_refused(options, caplog):
    async def work():
        async with site(FakeSlots(), guarded()) as here:
            client = await here.connect(**options)
            assert await client.closed() == 1008
            assert client.tags == [5]
            assert here.server.sessions.counts["taken"] == 0

    run(work())
    assert TOKEN not in caplog.text


def test_a_token_is_never_logged(caplog):
    async def work():
        async with site(FakeSlots(), guarded()) as here:
            await here.connect(protocols=("moshi-ttt.1", TOKEN_PREFIX + TOKEN))
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await here.connect(protocols=(TOKEN_PREFIX + TOKEN,))

    with caplog.at_level("DEBUG"):
        run(work())
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("same", True), ("https://friend.example", True), ("https://evil.example", False), ("null", False), ("", False)],
)
def test_origins(origin, allowed):
    async def work():
        options = ServerOptions(access=AccessRules(origins=("https://friend.example",)))
        async with site(FakeSlots(), options) as here:
            client = await here.connect(headers={"Origin": here.base if origin == "same" else origin})
            if allowed:
                await client.started()
            else:
                assert await client.closed() == 1008
                assert "--allow-origin" in client.errors[0]

    run(work())


def test_a_name_that_leads_here_is_refused():
    async def work():
        async with site(FakeSlots()) as here:
            client = await here.connect(headers={"Host": "evil.example", "Origin": "http://evil.example"})
            assert await client.closed() == 1008

    run(work())


def test_rules_of_an_address():
    assert rules_for("127.0.0.1", token=None, insecure=False, origins=()).hosts
    assert rules_for("::1", token=TOKEN, insecure=False, origins=()).hosts is None
    assert rules_for("0.0.0.0", token=None, insecure=True, origins=()).hosts is None
    with pytest.raises(ConfigError, match="--token-file"):
        rules_for("0.0.0.0", token=None, insecure=False, origins=())
    with pytest.raises(ConfigError, match="without a path"):
        rules_for("127.0.0.1", token=None, insecure=False, origins=("https://example.org/page",))


@pytest.mark.parametrize("text", ["short", "", "with spaces in the middle of it", "x" * 300])
def test_tokens_that_are_none(tmp_path, text):
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ConfigError, match="16 to 256") as caught:
        read_token(path)
    assert not text or text not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


# ---- pages


@pytest.mark.parametrize(
    "path", ["/static/../engine.py", "/static/%2e%2e/engine.py", "/static/..%2fengine.py", "/static//etc/passwd", "/x"]
)
def test_path_tricks_find_nothing(path):
    async def work():
        async with site(FakeSlots()) as here:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.server.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            assert b" 404 " in answer.split(b"\r\n", 1)[0], answer
            assert b"default-src 'self'" in answer

    run(work())


def test_pages_carry_their_rules():
    async def work():
        async with site(FakeSlots()) as here, here.http.get(here.base + "/") as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.content_type == "text/html"

    run(work())


# ---- the server itself


def test_an_engine_that_fails_ends_all_sessions_in_words():
    async def work():
        slots = FakeSlots()
        async with site(slots) as here:
            clients = [await (await here.extended()).started() for _ in range(2)]
            waiting = await here.extended()
            await waiting.until(lambda: waiting.of("queue"))
            slots.broken = RuntimeError("the model has a fault")
            await clients[0].say_pcm(tone(1))
            await asyncio.wait_for(here.server.failed.wait(), 10)
            async with here.http.get(f"{here.base}/api/health") as answer:
                assert answer.status == 503
            await here.server.close()
            for client in clients:
                assert await client.closed() == 1011
                assert "failed" in client.errors[0]
                assert "fault" not in client.errors[0]
            assert await waiting.closed() in (1001, 1011)

    run(work())


def test_a_command_that_fails_ends_the_engine_and_one_that_does_not_fit_does_not(tmp_path):
    async def work():
        slots = FakeSlots()
        async with site(slots, ServerOptions(store=MemoryStore(tmp_path))) as here:
            client = await (await here.extended()).started()
            assert (await client.ask("volume", value=7))["type"] == "error"
            assert here.server.engine.alive
            slots.forget = lambda row: 1 / 0
            await client.ws.send_bytes(b"\x04" + json.dumps({"type": "forget"}).encode())
            await asyncio.wait_for(here.server.failed.wait(), 10)
            assert not here.server.engine.alive

    run(work())


def test_a_port_in_use_is_told():
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port}.*--port"):
            bound_socket("127.0.0.1", port)


def test_serve_ends_with_false_where_the_engine_failed():
    slots = FakeSlots()
    slots.broken = RuntimeError("the model has a fault")

    def ready(port):
        import threading

        def talk():
            async def work():
                async with aiohttp.ClientSession() as http:
                    ws = await http.ws_connect(f"ws://127.0.0.1:{port}/api/chat?protocol=moshi-ttt.1&format=pcm_s16")
                    await ws.receive()
                    await ws.send_bytes(b"\x01" + bytes(2 * FRAME))
                    while (await ws.receive()).type == aiohttp.WSMsgType.BINARY:
                        pass
                    await ws.close()

            asyncio.run(work())

        threading.Thread(target=talk, daemon=True).start()

    assert not serve(slots, text_of, bound_socket("127.0.0.1", 0), ServerOptions(), ready)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_logs_are_json_without_what_was_said(tmp_path):
    stream = io.StringIO()
    handler = log_as_json(stream=stream)
    try:

        async def work():
            async with site(FakeSlots(), ServerOptions(store=MemoryStore(tmp_path))) as here:
                client = await (await here.extended("format=pcm_s16&seed=31415926")).started()
                await client.say_slowly(tone(5))
                saved = await client.ask("save")
                await client.ws.close()
                refused = await here.connect("temp=secret-words")
                assert await refused.closed() == 1008
                await here.counts(taken=0)
                session = client.of("session")[0]
                return [session["owner"], session["resume"], saved["memory"]["name"], *client.texts]

        said = asyncio.run(asyncio.wait_for(work(), 60))
    finally:
        logging.getLogger(LOGGER).removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    events = [line["event"] for line in lines]
    assert {"session began", "session ended", "connection refused"} <= set(events)
    assert next(line for line in lines if line["event"] == "session ended")["frames"] == 5
    for secret in (*said, "31415926", "secret-words", "127.0.0.1"):
        assert secret not in stream.getvalue()


def test_tls(certificate):
    async def work():
        async with site(FakeSlots(), ServerOptions(tls=tls_context(*certificate))) as here:
            client = await (await here.extended()).started()
            await client.say_slowly(tone(5))
            assert client.audio
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                await here.http.get(here.base.replace("https", "http"))

    run(work())


def test_tls_needs_both_files(certificate, tmp_path):
    with pytest.raises(ConfigError, match="both"):
        tls_context(certificate[0], None)
    with pytest.raises(ConfigError, match="no certificate"):
        tls_context(certificate[1], certificate[1])
