"""Moshi's Rust client and its web client, as their sources speak: stand-ins that send and expect the same bytes.

The Rust client (``moshi-cli``) always uses TLS and takes any certificate. It sends from the moment it is connected,
without waiting for the handshake; its first message holds both header pages and the first page of sound, and each page
one packet of 40 ms. Its keys send ``start`` and ``end turn``.

The web client names every option in the query, waits for the handshake, and then sends each page as it is made: two
header pages, then pages of two packets of 20 ms. It raises for a tag that it does not know, and closes without a code.
"""

from __future__ import annotations

import asyncio
import subprocess

import aiohttp
import numpy as np
import pytest

from moshi_ttt.serving.server import ServerOptions, tls_context

from . import ogg
from .client import FRAME, RATE, Client, site
from .fakes import FakeSlots

FRAMES = 30
HERTZ = 440
QUERY = {
    "text_temperature": "0.7", "text_topk": "25", "audio_temperature": "0.8", "audio_topk": "250", "pad_mult": "0",
    "text_seed": "123456", "audio_seed": "654321", "repetition_penalty_context": "64", "repetition_penalty": "1",
}  # fmt: skip


def run(work):
    asyncio.run(asyncio.wait_for(work, 90))


@pytest.fixture(scope="module")
def packets():
    """A tone and some noise: of a tone alone Opus makes packets of one frame of 40 ms, which cannot be divided."""
    times = np.arange(FRAMES * FRAME) / RATE
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(times))
    return ogg.encode(0.4 * np.sin(2 * np.pi * HERTZ * times) + noise)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    names = ["-subj", "/CN=localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    subprocess.run(command, check=True, capture_output=True)
    return tls_context(folder / "cert.pem", folder / "key.pem")


def check_what_came(client, slots, *, frames):
    """Whole pages that both clients' readers take, with the tone that was said; nothing that they do not know."""
    assert set(client.tags) == {0, 1, 2}, "the web client raises for others"
    assert client.tags[0] == 0
    assert client.errors == []
    messages = [ogg.read(message) for message in client.audio]
    pages = [page for message in messages for page in message]
    assert [page[3][0][:8] for page in pages[:2]] == [b"OpusHead", b"OpusTags"]
    assert pages[0][0] & ogg.FIRST
    assert len({page[2] for page in pages}) == 1, "one stream for the whole connection"
    assert all(len(page[3]) == 1 for page in pages), "40 ms a page"
    positions = [page[1] for page in pages[2:]]
    assert positions == [1920 * (n + 1) for n in range(len(positions))], "counted in samples of 48 kHz"
    heard = ogg.decode(b"".join(client.audio))
    assert len(heard) >= (frames - 4) * FRAME
    middle = heard[5 * FRAME : 5 * FRAME + RATE]
    spectrum = np.abs(np.fft.rfft(middle))
    assert abs(float(np.fft.rfftfreq(len(middle), 1 / RATE)[spectrum.argmax()]) - HERTZ) < 5
    assert client.texts == [f"<{4 + n}>" for n in range(3, 3 + len(client.texts))]
    assert slots.frames[0] >= frames - 1


def rust_messages(packets, samples_of):
    """The messages that it sends; ``samples_of[n]``: samples that its microphone had given when it wrote packet n."""
    pages = ogg.Pages(serial=42)
    waiting = pages.page([ogg.head(3840, 48_000)], 0, ogg.FIRST) + pages.page([ogg.tags("KyutaiMoshi")], 0)
    for packet, samples in zip(packets, samples_of, strict=True):
        yield b"\x01" + waiting + pages.page([packet], samples)
        waiting = b""


@pytest.mark.parametrize("burst", [1, 3])
def test_the_rust_client(packets, certificate, burst):
    """It looks at its microphone every 20 ms, and writes all that is there, at the same position."""

    async def work():
        slots = FakeSlots(count=1)
        async with site(slots, ServerOptions(tls=certificate)) as here:
            ws = await here.http.ws_connect(f"wss://127.0.0.1:{here.server.port}/api/chat")
            client = Client(ws)
            samples = [960 * burst * (n // burst + 1) for n in range(len(packets))]
            for number, message in enumerate(rust_messages(packets, samples)):
                await ws.send_bytes(message)
                if number in (20, 30):
                    await ws.send_bytes(bytes([3, number == 30]))  # Enter and Space
                if number >= 4 and number % burst == 0:
                    await asyncio.sleep(0.02)
                    await client.until(lambda number=number: number // 2 - slots.frames.get(0, 0) <= 3 + burst)
            await client.until(lambda: len(client.texts) >= FRAMES - 8)
            check_what_came(client, slots, frames=FRAMES - 4)
            assert ("restart", 0) not in slots.calls
            ws._response.connection.transport.abort()  # it ends without a closing message
            await here.counts(free=1, taken=0)
            client.reader.cancel()

    run(work())


def test_the_rust_client_is_refused_in_words_where_all_places_are_taken(packets, certificate):
    async def work():
        async with site(FakeSlots(count=1), ServerOptions(tls=certificate)) as here:
            await (await here.connect()).started()
            ws = await here.http.ws_connect(f"wss://127.0.0.1:{here.server.port}/api/chat")
            client = Client(ws)
            for message in rust_messages(packets[:8], range(8)):
                try:
                    await ws.send_bytes(message)
                except (ConnectionError, aiohttp.ClientError):
                    break
            assert await client.closed() == 1013
            assert client.tags == [5]

    run(work())


def web_messages(packets):
    """Its recorder writes pages of 40 ms in two packets, in one message each, the headers too."""
    pages = ogg.Pages(serial=0x1A2B3C4D)
    yield b"\x01" + pages.page([ogg.head(3840, 48_000)], 0, ogg.FIRST)
    yield b"\x01" + pages.page([ogg.tags("RecorderJS")], 0)
    for number, packet in enumerate(packets, start=1):
        yield b"\x01" + pages.page(ogg.halves(packet), 1920 * number)


@pytest.mark.parametrize("more", [{}, {"worker_auth_id": "none", "email": "a@example.org"}])
def test_the_web_client(packets, more):
    async def work():
        slots = FakeSlots(count=1)
        async with site(slots) as here:
            address = f"ws://127.0.0.1:{here.server.port}"
            headers = {"Origin": address.replace("ws", "http", 1)}
            ws = await here.http.ws_connect(f"{address}/api/chat", params={**more, **QUERY}, headers=headers)
            client = await Client(ws).started()
            for number, message in enumerate(web_messages(packets)):
                await ws.send_bytes(message)
                if number % 2:
                    await asyncio.sleep(0.01)
                    await client.until(lambda number=number: number // 2 - slots.frames.get(0, 0) <= 3)
            await client.until(lambda: len(client.texts) >= FRAMES - 4)
            check_what_came(client, slots, frames=FRAMES)
            settings = slots.settings[0]
            assert (settings.text_temperature, settings.text_top_k) == (0.7, 25)
            assert (settings.temperature, settings.top_k, settings.seed) == (0.8, 250, 654_321)
            await ws._writer.send_frame(b"", aiohttp.WSMsgType.CLOSE)  # as browsers do where no code is given
            await here.counts(free=1, taken=0)

    run(work())


def test_pages_are_read_as_they_were_written():
    pages = ogg.Pages(serial=7)
    packets = [bytes([n % 251]) * n for n in (0, 1, 254, 255, 256, 510, 700)]
    whole = pages.page(packets, 99, ogg.FIRST) + pages.page([b"x"], 100, ogg.LAST)
    assert ogg.read(whole) == [(ogg.FIRST, 99, 7, packets), (ogg.LAST, 100, 7, [b"x"])]
    with pytest.raises(AssertionError):
        ogg.read(whole[:-1])
    with pytest.raises(AssertionError):
        ogg.read(whole[:-1] + b"y")


def test_halves_of_packets_are_the_same_sound(packets):
    def stream(pages_of):
        pages = ogg.Pages(serial=1)
        start = pages.page([ogg.head(0, 48_000)], 0, ogg.FIRST) + pages.page([ogg.tags("x")], 0)
        return ogg.decode(start + b"".join(pages.page(pages_of(p), 1920 * (n + 1)) for n, p in enumerate(packets)))

    assert np.array_equal(stream(ogg.halves), stream(lambda packet: [packet]))
