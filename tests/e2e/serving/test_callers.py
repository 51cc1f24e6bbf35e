"""Several people talk to the tiny Moshi at once, over real WebSockets: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import aiohttp
import numpy as np
import pytest
import sphn
import torch

from moshi_ttt.apps.live import text_of
from moshi_ttt.apps.talker import SHIPPED_MEMORY, load_talker
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.serving.memory_store import MemoryStore
from moshi_ttt.serving.server import ServerOptions
from moshi_ttt.serving.sessions import SessionLimits

from .client import FRAME, RATE, Client, Opus, site
from .recording import RecordingSlots, alone, equal


@pytest.fixture(scope="module")
def talker():
    return load_talker("quickstart", SHIPPED_MEMORY)


@pytest.fixture(scope="module")
def speech():
    return [sphn.read(str(path), sample_rate=RATE)[0][0].astype(np.float32) for path in speech_files()]


async def one_call(here, number, speech, draw, frames, *, patient):
    """Talk for some frames with a recording of one's own, in Opus, and leave. Returns (seed, what came).

    ``patient``: wait for answers, so that a busy machine drops nothing. Else talk in real time, as people do.
    """
    await asyncio.sleep(draw.random())
    while not here.server.sessions.counts["free"]:  # the last caller's row is given back in the background
        await asyncio.sleep(0.01)
    query = f"seed={number}&temp=0.7" + ("&protocol=moshi-ttt.1" if number % 2 else "")
    client, opus = await (await here.connect(query)).started(), Opus()
    own = np.resize(speech[number % len(speech)], frames * FRAME)
    for start in range(0, len(own), FRAME):
        await client.ws.send_bytes(opus.page(own[start : start + FRAME]))
        sent = start // FRAME + 1
        if patient:
            await asyncio.sleep(0.05 * draw.random())
            await client.until(lambda sent=sent: sent - len(client.audio) <= 4)
        else:
            await asyncio.sleep(0.16 if draw.random() < 0.1 else 0.078)
    await asyncio.sleep(0.3)
    await client.ws.close()
    await client.closed()
    return number, client


async def callers_until(here, speech, lanes, calls, frames, seed=0):
    """``lanes`` people at a time, who come and go."""
    draw, numbers, done = random.Random(seed), iter(range(1, calls + 1)), []

    async def lane():
        for number in numbers:
            done.append(await one_call(here, number, speech, draw, draw.randint(*frames), patient=True))

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return done


def check(slots, recorded, done):
    """Every call against its frames alone: tokens, samples, and the bytes that came. Returns how many frames."""
    compared = 0
    for number, client in done:
        stream = recorded.of_seed(number)
        assert stream.frames, number
        replayed = alone(slots, stream, row=number % slots.count)
        assert equal(replayed, stream.outputs), f"caller {number}"
        writer = sphn.OpusStreamWriter(RATE)
        expected = b"".join(bytes(writer.append_pcm(output.pcm.numpy())) for output in replayed)
        came = b"".join(client.audio)
        assert came
        assert expected.startswith(came), f"caller {number}: the bytes differ"
        compared += len(stream.frames)
    return compared


def test_three_callers_get_what_each_would_get_alone(talker, speech):
    with Slots(talker.model, talker.mimi, 3) as slots:
        recorded = RecordingSlots(slots)

        async def work():
            async with site(recorded, ServerOptions(sessions=SessionLimits(resume_sec=0))) as here:
                done = await callers_until(here, speech, lanes=3, calls=5, frames=(10, 22))
                await here.counts(taken=0)
                return done

        done = asyncio.run(asyncio.wait_for(work(), 240))
        assert check(slots, recorded, done) >= 50


@pytest.mark.slow
def test_eight_callers_for_five_minutes(talker, speech):
    with Slots(talker.model, talker.mimi, 8) as slots:
        recorded = RecordingSlots(slots)

        async def work():
            ends = time.monotonic() + 300
            done = []
            async with site(recorded, ServerOptions(sessions=SessionLimits(resume_sec=0))) as here:
                draw = random.Random(1)
                numbers = iter(range(1, 10_000))

                async def lane():
                    while time.monotonic() < ends:
                        done.append(
                            await one_call(here, next(numbers), speech, draw, draw.randint(20, 300), patient=False)
                        )

                await asyncio.gather(*(lane() for _ in range(8)))
                await here.counts(taken=0)
            return done

        done = asyncio.run(asyncio.wait_for(work(), 900))
        compared = check(slots, recorded, done)
        dropped = sum(1 for _, client in done for _ in client.of("stats")[-1:] if client.of("stats")[-1]["dropped"])
        print(f"{len(done)} calls, {compared} accepted frames equal alone, {dropped} calls were told of drops")
        assert compared > 1000


def test_a_memory_that_was_kept_goes_on_in_another_row(talker, speech, tmp_path):
    """Saved over the wire, restored by its owner in another connection: the same as in one process without a file."""
    with Slots(talker.model, talker.mimi, 2) as slots:
        store = MemoryStore(tmp_path)

        async def work():
            async with site(slots, ServerOptions(store=store)) as here:
                first = await (await here.extended("format=pcm_s16&seed=1")).started()
                await first.say_slowly(speech[0][: 20 * FRAME])
                saved = await first.ask("save")
                second = await (await here.extended("format=pcm_s16&seed=2")).started()
                await second.ask("owner", owner=first.of("session")[0]["owner"])
                await second.ask("restore", name=saved["memory"]["name"])
                again = await second.ask("save")
                owner = first.of("session")[0]["owner"]
                one, two = (store.load(owner, each["memory"]["name"]) for each in (saved, again))
                assert one.tensors.keys() == two.tensors.keys()
                assert all(bool((tensor == two.tensors[name]).all()) for name, tensor in one.tensors.items())
                await second.until(lambda: second.of("stats"))
                moved = [each["moved"] for each in second.of("stats")[-1]["sites"]]
                assert all(value > 0 for value in moved), "the restored memory is not the learned start"

        asyncio.run(asyncio.wait_for(work(), 120))


def test_loss_of_smaller_memories_is_measured_on_a_real_one(talker, speech, tmp_path):
    with Slots(talker.model, talker.mimi, 1) as slots:
        slots.join(0, SlotSettings())
        for start in range(0, 20 * FRAME, FRAME):
            slots.tick({0: torch.from_numpy(speech[0][start : start + FRAME])})
        state, start = slots.save_row(0, "memory"), slots.learned_start()
        losses = {}
        for precision in ("exact", "difference", "bfloat16"):
            store = MemoryStore(tmp_path / precision, precision=precision, start=start)
            stored, losses[precision] = store.save("0" * 32, state)
            slots.join(0, SlotSettings(), store.load("0" * 32, stored.name))
        assert losses["exact"] == 0
        assert 0 < losses["difference"] < 4e-3
        assert 0 < losses["bfloat16"] < 4e-3


# ---- the command


def wait_for_port(process):
    for line in process.stderr:
        if found := re.search(r'"listening", "port": (\d+)', line):
            return int(found[1])
    raise AssertionError(process.wait())


def test_the_command_serves_saves_at_sigterm_and_says_goodbye(tmp_path):
    command = ["serve", "quickstart", "--slots", "2", "--port", "0", "--memories", str(tmp_path / "memories")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moshi_ttt", *command], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        port = wait_for_port(process)

        async def work():
            async with aiohttp.ClientSession() as http:
                address = f"http://127.0.0.1:{port}"
                async with http.get(f"{address}/api/info") as answer:
                    assert (await answer.json())["blocks"]
                ws = await http.ws_connect(f"{address}/api/chat?protocol=moshi-ttt.1&format=pcm_s16")
                client = await Client(ws).started()
                await client.ask("keep", enabled=True)
                await client.say_pcm(np.zeros(3 * FRAME))
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)  # one stop often comes twice
                assert await client.closed() == 1001
                (saved,) = client.of("saved")
                return client.of("session")[0]["owner"], saved["memory"]["name"]

        owner, name = asyncio.run(asyncio.wait_for(work(), 60))
        assert process.wait(30) == 0
        rest = process.stderr.read()
        assert owner not in rest
        assert "Traceback" not in rest
        assert MemoryStore(tmp_path / "memories").load(owner, name).frames >= 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--tls-cert", "x.pem"], "--tls-key"),
        (["--token-file", "none"], "cannot be read"),
        (["--memory-precision", "int4"], "exact, difference, bfloat16"),
        (["--allow-origin", "example.org"], "https://example.org"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_the_command_refuses(cli, arguments, words):
    result = cli("serve", "quickstart", "--port", "0", *arguments)
    assert result.exit_code == 2
    assert words in result.said


def test_the_command_says_that_its_port_is_in_use(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = cli("serve", "quickstart", "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "Cannot listen" in result.said


def test_text_is_as_moshi_writes_it(talker):
    said = text_of(talker)
    assert said(talker.codec.text_padding) is None
    pieces = [said(token) for token in range(4, 40)]
    assert all(isinstance(piece, str) for piece in pieces)
    assert not any("▁" in piece for piece in pieces)
