"""Conversations over real WebSockets on loopback, with slots that have no model."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from moshi_ttt.serving.audio import OpusOut
from moshi_ttt.serving.engine import QUEUE_FRAMES
from moshi_ttt.serving.memory_store import MemoryStore
from moshi_ttt.serving.server import ServerOptions
from moshi_ttt.serving.sessions import SessionLimits

from .client import FRAME, Opus, site
from .fakes import FakeSlots


def tone(frames, value=0.25):
    return np.full(frames * FRAME, value, np.float32)


def run(work):
    asyncio.run(asyncio.wait_for(work, 60))


def test_a_stock_client_gets_what_moshi_sends_and_nothing_else():
    async def work():
        async with site(FakeSlots()) as here:
            client, opus = await (await here.connect()).started(), Opus()
            for _ in range(8):
                await client.ws.send_bytes(opus.page(tone(1)))
                await asyncio.sleep(0.03)
            await client.until(lambda: len(client.texts) >= 3)
            assert set(client.tags) <= {0, 1, 2}
            assert client.tags[0] == 0
            assert client.texts[:3] == ["<7>", "<8>", "<9>"]
            decoded = np.concatenate([opus.reader.append_bytes(each) for each in client.audio])
            assert len(decoded) > 0
            await client.ws.close()
            await here.counts(free=2, taken=0)

    run(work())


def test_two_callers_hear_themselves():
    async def work():
        slots = FakeSlots()
        async with site(slots) as here:
            one, two = [await (await here.extended()).started() for _ in range(2)]
            await asyncio.gather(one.say_slowly(tone(12, 0.25)), two.say_slowly(tone(9, -0.5)))
            for client, value in ((one, 0.25), (two, -0.5)):
                heard = np.frombuffer(b"".join(client.audio), "<i2") / 32767
                assert len(heard) >= 4 * FRAME
                assert np.allclose(heard, value, atol=1e-3)
        assert len(slots.threads) == 1, "one thread owns the model"

    run(work())


def test_frames_that_come_together_are_answered_together():
    async def work():
        slots = FakeSlots(count=3, tick_sec=0.05)
        async with site(slots) as here:
            clients = [await (await here.extended()).started() for _ in range(3)]
            for _ in range(10):
                await asyncio.gather(*(client.say_pcm(tone(1)) for client in clients))
                await asyncio.sleep(0.08)
            for client in clients:
                await client.until(lambda client=client: len(client.audio) >= 3)
        assert sum(len(rows) == 3 for rows in slots.ticks) >= 5, slots.ticks

    run(work())


def test_a_fast_sender_loses_the_oldest_frames_and_is_told():
    async def work():
        slots = FakeSlots(tick_sec=0.2)
        async with site(slots) as here:
            client = await (await here.extended()).started()
            await client.say_pcm(tone(40))
            await client.until(lambda: any(each["dropped"] for each in client.of("stats")))
            stats = client.of("stats")[-1]
            assert stats["queued"] <= QUEUE_FRAMES
            assert stats["dropped"] + stats["queued"] + stats["frames"] >= 39
            assert stats["sites"][0]["inner_loss"] is None

    run(work())


def test_a_full_server_refuses_stock_clients_in_words():
    async def work():
        async with site(FakeSlots(count=1)) as here:
            first = await (await here.connect()).started()
            second = await here.connect()
            assert await second.closed() == 1013
            assert second.tags == [5]
            assert "taken" in second.errors[0]
            await first.ws.close()
            await here.counts(free=1)
            await (await here.connect()).started()

    run(work())


class SlowToLeave(FakeSlots):
    """A row is given back only once ``gone`` is set."""

    def __init__(self, count):
        super().__init__(count)
        self.gone = threading.Event()

    def leave(self, row):
        assert self.gone.wait(20)
        super().leave(row)


def test_a_stock_client_that_comes_back_at_once_gets_the_row_that_is_given_back():
    async def work():
        slots = SlowToLeave(count=1)
        async with site(slots) as here:
            first = await (await here.connect()).started()
            await first.ws.close()
            second = await here.connect()
            await here.counts(waiting=1)
            third = await here.connect()
            assert await third.closed() == 1013, "one row is given back, and it is promised"
            assert second.tags == []
            slots.gone.set()
            await second.started()
            assert second.tags == [0]
            await second.ws.close()
            await here.counts(free=1, taken=0, waiting=0)

    run(work())


def test_a_stock_client_is_refused_when_the_row_is_not_given_back_in_time():
    async def work():
        slots = SlowToLeave(count=1)
        async with site(slots, ServerOptions(sessions=SessionLimits(leaving_sec=0.2))) as here:
            await (await (await here.connect()).started()).ws.close()
            second = await here.connect()
            assert await second.closed() == 1013
            assert "taken" in second.errors[0]
            await here.counts(waiting=0)
            gone = await here.connect()  # and one that goes away while it waits
            await here.counts(waiting=1)
            await gone.ws.close()
            await here.counts(waiting=0)
            slots.gone.set()
            await here.counts(free=1, taken=0)
            await (await here.connect()).started()

    run(work())


def test_clients_that_come_and_go_at_once_always_find_the_row():
    async def work():
        async with site(FakeSlots(count=1)) as here:
            for _ in range(40):
                await (await (await here.connect()).started()).ws.close()
            await here.counts(free=1, taken=0, waiting=0)

    run(work())


def test_others_wait_in_line():
    async def work():
        async with site(FakeSlots(count=1), ServerOptions(sessions=SessionLimits(waiting=2))) as here:
            first = await (await here.connect()).started()
            second, third = await here.extended(), await here.extended()
            await second.until(lambda: second.of("queue"))
            await third.until(lambda: third.of("queue"))
            assert [each.of("queue")[-1]["position"] for each in (second, third)] == [1, 2]
            fourth = await here.extended()
            assert await fourth.closed() == 1013
            stock = await here.connect()
            assert await stock.closed() == 1013
            await first.ws.close()
            await second.started()
            await third.until(lambda: third.of("queue")[-1]["position"] == 1)
            await third.ws.close()
            await here.counts(waiting=0)
            await second.ws.close()
            await here.counts(free=1, taken=0)

    run(work())


def test_a_client_that_leaves_as_its_place_comes_leaks_no_row():
    async def work():
        async with site(FakeSlots(count=1)) as here:
            for _ in range(8):
                first = await (await here.extended()).started()
                second = await here.extended()
                await second.until(lambda second=second: second.of("queue"))
                await asyncio.gather(first.ws.close(), second.ws.close())
                await here.counts(free=1, taken=0, waiting=0)

    run(work())


def test_a_dropped_connection_comes_back_to_its_row():
    async def work():
        slots = FakeSlots(count=1)
        async with site(slots) as here:
            client = await (await here.extended()).started()
            await client.say_slowly(tone(5))
            secret, frames = client.of("session")[0]["resume"], slots.frames[0]
            client.ws._response.connection.transport.abort()
            await client.closed()
            assert here.server.sessions.counts["taken"] == 1
            again = await (await here.extended(f"format=pcm_s16&resume={secret}")).started()
            told = again.of("session") or await again.until(lambda: again.of("session")) or again.of("session")
            assert told[0]["resumed"]
            await again.say_slowly(tone(3))
            assert slots.frames[0] > frames
            await again.ws.close()
            await here.counts(free=1)
            assert [name for name, _ in slots.calls].count("join") == 1

    run(work())


def test_a_session_that_goes_on_elsewhere_closes_the_old_connection():
    async def work():
        async with site(FakeSlots(count=1)) as here:
            client = await (await here.extended()).started()
            await client.until(lambda: client.of("session"))
            again = await here.extended(f"format=pcm_s16&resume={client.of('session')[0]['resume']}")
            await again.started()
            assert await client.closed() == 1008
            assert here.server.sessions.counts["taken"] == 1
            await again.say_slowly(tone(4))
            assert again.audio

    run(work())


def test_a_wrong_secret_begins_a_new_session():
    async def work():
        async with site(FakeSlots()) as here:
            client = await (await here.extended("format=pcm_s16&resume=" + "x" * 32)).started()
            await client.until(lambda: client.of("session"))
            assert not client.of("session")[0]["resumed"]

    run(work())


def test_a_lost_session_ends_after_a_while():
    async def work():
        limits = SessionLimits(resume_sec=0.5)
        async with site(FakeSlots(count=1), ServerOptions(sessions=limits)) as here:
            client = await (await here.extended()).started()
            client.ws._response.connection.transport.abort()
            await client.closed()
            await here.counts(free=1)

    run(work())


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (SessionLimits(idle_sec=0.5), "No sound"),
        (SessionLimits(session_sec=0.5), "lasts"),
    ],
)
def test_time_is_limited(limits, words):
    async def work():
        async with site(FakeSlots(count=1), ServerOptions(sessions=limits)) as here:
            client = await (await here.extended()).started()
            assert await client.closed() == 1001
            assert words in client.errors[0]
            await here.counts(free=1)

    run(work())


def test_memories_are_saved_listed_restored_and_deleted(tmp_path):
    async def work():
        slots = FakeSlots(count=2)
        async with site(slots, ServerOptions(store=MemoryStore(tmp_path))) as here:
            client = await (await here.extended()).started()
            await client.say_slowly(tone(5))
            heard = slots.heard[0]
            saved = await client.ask("save")
            assert saved["type"] == "saved"
            assert saved["loss"] == 0
            owner = client.of("session")[0]["owner"]
            await client.ask("forget")
            assert slots.heard[0] == 0
            name = saved["memory"]["name"]
            assert (await client.ask("restore", name=name))["type"] == "restored"
            assert slots.heard[0] == heard

            other = await (await here.extended()).started()  # somebody else, and then the same person again
            assert (await other.ask("list"))["memories"] == []
            assert (await other.ask("restore", name=name))["type"] == "error"
            assert (await other.ask("delete", name=name))["type"] == "error"
            assert (await other.ask("owner", owner=owner))["type"] == "owner"
            assert [each["name"] for each in (await other.ask("list"))["memories"]] == [name]
            assert (await other.ask("restore", name=name))["type"] == "restored"
            assert slots.heard[1] == heard
            assert (await other.ask("delete", name=name))["type"] == "deleted"
            assert (await client.ask("list"))["memories"] == []
            assert (await client.ask("save", what="session"))["memory"]["kind"] == "session"

    run(work())


def test_requests_are_answered_or_refused_in_words():
    async def work():
        slots = FakeSlots()
        async with site(slots) as here:
            client = await (await here.extended()).started()
            assert await client.ask("learning", enabled=False)
            assert (await client.ask("volume", value=0.5))["value"] == 0.5
            assert (await client.ask("restart"))["type"] == "restarted"
            assert ("set_updates", 0) in slots.calls
            assert ("set_volume", 0) in slots.calls
            assert (await client.ask("pause"))["type"] == "paused"
            frames = slots.frames[0]
            await client.say_pcm(tone(3))
            await asyncio.sleep(0.1)
            assert slots.frames[0] == frames
            await client.ask("resume")
            for kind, fields in {
                "volume": {"value": 9.0}, "learning": {"enabled": "no"}, "save": {}, "restore": {"name": 3},
                "owner": {"owner": "../x"}, "nonsense": {}, "keep": {"enabled": True},
            }.items():  # fmt: skip
                answer = await client.ask(kind, **fields)
                assert answer["type"] == "error", kind
                assert answer["message"].endswith((".", "'")), answer
            await client.say_slowly(tone(4))
            assert client.audio

    run(work())


def test_shutting_down_saves_what_was_asked_for_and_says_goodbye(tmp_path):
    async def work():
        store = MemoryStore(tmp_path)
        slots = FakeSlots(count=1)
        async with site(slots, ServerOptions(store=store)) as here:
            client = await (await here.extended()).started()
            waiting = await here.extended()
            await client.say_slowly(tone(5))
            await client.ask("keep", enabled=True)
            owner, heard = client.of("session")[0]["owner"], slots.heard[0]
            await here.server.close()
            assert await client.closed() == 1001
            assert await waiting.closed() == 1001
            assert "Goodbye" in client.errors[0]
            (saved,) = client.of("saved")
            assert float(store.load(owner, saved["memory"]["name"]).tensors["heard"]) == heard
        assert slots.settings == {}, "every row was left"

    run(work())


def test_a_client_that_goes_away_has_its_memory_kept_if_it_asked(tmp_path):
    async def work():
        store = MemoryStore(tmp_path)
        async with site(FakeSlots(), ServerOptions(store=store)) as here:
            client = await (await here.extended()).started()
            await client.ask("keep", enabled=True)
            await client.ws.close()
            await here.counts(free=2)
            assert len(store.listed(client.of("session")[0]["owner"])) == 1

    run(work())


def test_the_loop_does_other_work_between_the_frames_that_are_encoded(monkeypatch):
    """Opus holds the interpreter: the answers of a tick, which come at once, are encoded one in a turn of the loop."""
    turn, encoded = [0], []

    def count():
        turn[0] += 1
        asyncio.get_running_loop().call_soon(count)

    original = OpusOut.encode

    def encode(self, pcm):
        encoded.append(turn[0])
        return original(self, pcm)

    async def work():
        monkeypatch.setattr(OpusOut, "encode", encode)
        async with site(FakeSlots(count=8)) as here:
            callers = [(await (await here.connect()).started(), Opus()) for _ in range(8)]
            count()
            for _ in range(12):
                for client, opus in callers:
                    await client.ws.send_bytes(opus.page(tone(1)))
            for client, _ in callers:
                await client.until(lambda client=client: len(client.audio) >= 2)
        assert len(encoded) >= 16
        assert len(set(encoded)) == len(encoded), "two frames in one turn"

    run(work())
