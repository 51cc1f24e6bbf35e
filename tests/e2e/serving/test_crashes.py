"""A server that is killed while people talk and save: what it said was saved is there, whole, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from moshi_ttt.serving.memory_store import MemoryStore, StoreLimits, new_owner

from .client import FRAME, Client

KILLS_QUICK, KILLS = 3, 50
PROGRAM = Path(__file__).with_name("crash_server.py")


@dataclass
class Tally:
    """What was seen over all kills."""

    acknowledged: int = 0
    loaded: int = 0
    half_written: int = 0
    restored: int = 0
    frames: int = 0


async def person(address, owner, draw, tally, saved):
    """Talk and save without end, now and then leave with a memory that is kept at the end, and come again."""
    noise = np.random.default_rng(draw.randrange(2**32))
    async with aiohttp.ClientSession() as http:
        while True:
            ws = await http.ws_connect(f"{address}/api/chat?protocol=moshi-ttt.1&format=pcm_s16")
            client = await Client(ws).started()
            try:
                await client.ask("owner", owner=owner)
                await client.ask("keep", enabled=draw.random() < 0.5)
                for _ in range(draw.randint(1, 8)):
                    await client.say_pcm(0.3 * noise.standard_normal(draw.randint(0, 2) * FRAME))
                    tally.frames += 1
                    answer = await client.ask("save", what=draw.choice(["memory", "session"]))
                    saved.append(answer["memory"]["name"])
                    if draw.random() < 0.2:
                        await client.ask("restore", name=draw.choice(saved))
                await ws.close()
            finally:
                client.reader.cancel()


async def read_line(process, start):
    """The next line of the program that begins with ``start``; others, which the server logs, are passed over."""
    while line := (await process.stdout.readline()).decode():
        if line.startswith(start):
            return line.split()
    raise AssertionError(f"the program ended: {await process.wait()}")


async def live_until_killed(process, folder, owner, draw, tally):
    """One server: people talk to it, and a kill comes at a random moment. Returns the names that it said it saved."""
    process.stdin.write(b"serve\n")
    _, port, pid = await read_line(process, "port")
    assert list(folder.glob("*/.*")) == [], "leftovers are cleared at the next start"
    saved = []
    people = [asyncio.ensure_future(person(f"http://127.0.0.1:{port}", owner, draw, tally, saved)) for _ in range(3)]
    if tally.loaded:  # the next day: a memory from before the kill goes on
        tally.restored += await goes_on(f"http://127.0.0.1:{port}", owner, folder)
    while not saved and not any(each.done() for each in people):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.6 * draw.random())
    os.kill(int(pid), signal.SIGKILL)
    assert await read_line(process, "ended") == ["ended", str(-signal.SIGKILL)]
    for each in people:
        each.cancel()
    ends = await asyncio.gather(*people, return_exceptions=True)
    allowed = (asyncio.CancelledError, aiohttp.ClientError, ConnectionError, AssertionError, KeyError)
    assert all(isinstance(end, allowed) for end in ends), ends
    return saved


async def goes_on(address, owner, folder):
    """Restore one of what is kept through the server, and hear it answer. Returns 1."""
    name = next(iter(MemoryStore(folder).listed(owner))).name
    async with aiohttp.ClientSession() as http:
        while True:  # until there is a place: the people took all rows
            ws = await http.ws_connect(f"{address}/api/chat?protocol=moshi-ttt.1&format=pcm_s16")
            client = Client(ws)
            try:
                await client.started()
                await client.ask("owner", owner=owner)
                assert (await client.ask("restore", name=name))["type"] == "restored"
                await client.say_pcm(np.zeros(5 * FRAME, np.float32))
                await client.until(lambda client=client: client.audio)
                await ws.close()
                return 1
            finally:
                client.reader.cancel()


def check_what_is_left(folder, owner, saved, tally):
    """Every name that was told is there and loads; what else is there loads too; the rest is cleared away."""
    tally.half_written += len(list(folder.glob("*/.*")))
    store = MemoryStore(folder, StoreLimits(per_owner=10**6))
    kept = {each.name for each in store.listed(owner)}
    assert set(saved) <= kept, "a client was told of a memory that is not there"
    for name in kept:
        state = store.load(owner, name)
        assert all(bool(tensor.isfinite().all()) for tensor in state.tensors.values() if tensor.is_floating_point())
        tally.loaded += 1
    tally.acknowledged += len(saved)
    for name in sorted(kept)[:-2]:  # two stay, for the next server to go on with
        store.delete(owner, name)


async def kill_again_and_again(folder, kills, seed=0):
    draw, owner, tally = random.Random(seed), new_owner(), Tally()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), str(folder), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        await read_line(process, "loaded")
        for _ in range(kills):
            saved = await live_until_killed(process, folder, owner, draw, tally)
            check_what_is_left(folder, owner, saved, tally)
        with MemoryStore(folder).opened():
            assert list(folder.glob("*/.*")) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    return tally


@pytest.mark.exhaustive  # a killed process leaves no half memory in test_memory_store.py
def test_a_killed_server_leaves_whole_memories(tmp_path):
    tally = asyncio.run(asyncio.wait_for(kill_again_and_again(tmp_path, KILLS_QUICK), 240))
    assert tally.acknowledged >= KILLS_QUICK
    assert tally.restored == KILLS_QUICK - 1


@pytest.mark.slow
def test_a_server_that_is_killed_at_fifty_moments(tmp_path):
    tally = asyncio.run(asyncio.wait_for(kill_again_and_again(tmp_path, KILLS, seed=1), 1800))
    print(f"{KILLS} kills: {tally}")
    assert tally.acknowledged >= KILLS
    assert tally.restored == KILLS - 1
    assert tally.half_written > 0, "no kill hit a save"
