"""Disks that do not take a memory: full, out of names, over quota, read-only. The client is told, and talks on."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess

import pytest

from moshi_ttt.core.errors import HostError
from moshi_ttt.serving.memory_store import MemoryStore, MemoryStoreError, StoreLimits, new_owner
from moshi_ttt.serving.server import ServerOptions

from .client import site
from .fakes import FakeSlots, fake_state
from .test_faults import undisturbed
from .test_memory_store import same

LIMITS = StoreLimits(per_owner=10**6)


def mount(folder, *options):
    """Mount a file system in memory. Skips where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path, request):
    """A folder on a file system of its own, of 300 KiB or with the options of ``request.param``."""
    mount(tmp_path, *getattr(request, "param", ("size=300k",)))
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_full_disk(small):
    store, owner, state = MemoryStore(small, LIMITS), new_owner(), fake_state(values=10_000)
    kept = [store.save(owner, state)[0] for _ in range(7)]  # 40 KB each
    for _ in range(5):
        with pytest.raises(MemoryStoreError, match="No space left"):
            store.save(owner, state)
    assert names(small) == sorted(f"{each.name}.safetensors" for each in kept), "no half-written file is left"
    for each in kept:
        assert same(store.load(owner, each.name), state)
    store.delete(owner, kept[0].name)
    again, _ = store.save(owner, state)
    assert same(store.load(owner, again.name), state)


@pytest.mark.parametrize("small", [("size=1m", "nr_inodes=3")], indirect=True)
def test_a_disk_without_room_for_another_name(small):
    store = MemoryStore(small, LIMITS)
    stored, _ = store.save(owner := new_owner(), fake_state())
    with pytest.raises(MemoryStoreError, match=r"disk did not take it.*No space left"):
        store.save(new_owner(), fake_state())  # whose folder cannot be made
    assert store.listed(owner) == [stored]


def test_a_disk_that_became_read_only(small):
    store, owner, state = MemoryStore(small, LIMITS), new_owner(), fake_state(values=100)
    stored, _ = store.save(owner, state)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for work in (lambda: store.save(owner, state), lambda: store.delete(owner, stored.name)):
        with pytest.raises(MemoryStoreError, match=r"disk did not .*Read-only") as told:
            work()
        assert str(small) not in str(told.value), "a client is not told where the files lie"
    with pytest.raises(MemoryStoreError, match="Read-only"):
        store.save(new_owner(), state)
    assert store.listed(owner) == [stored]
    assert same(store.load(owner, stored.name), state)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_every_step_of_a_save_may_fail(tmp_path, monkeypatch, call, number):
    store, owner, state = MemoryStore(tmp_path, LIMITS), new_owner(), fake_state(values=100)
    stored, _ = store.save(owner, state)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(MemoryStoreError, match=os.strerror(number)):
            store.save(new_owner() if call == "mkdir" else owner, state)
    assert names(tmp_path) == [f"{stored.name}.safetensors"]
    assert same(store.load(owner, stored.name), state)
    store.save(owner, state)


def test_a_damaged_file_is_refused_without_its_path(tmp_path):
    store, owner = MemoryStore(tmp_path, LIMITS), new_owner()
    stored, _ = store.save(owner, fake_state(values=100))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(HostError, match=stored.name) as told:
        store.load(owner, stored.name)
    assert str(tmp_path) not in str(told.value)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_client_is_told_and_talks_on(small, fault):
    """In the middle of others who talk; a memory that was to be kept at the end is not, and the row is given back."""

    class Large(FakeSlots):
        def save_row(self, row, kind):
            return fake_state(self.heard[row], kind, values=10_000 if fault == "read-only" else 100_000)

    async def work():
        async with site(Large(count=2), ServerOptions(store=MemoryStore(small, LIMITS))) as here:
            if fault == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)

            async def fail():
                client = await (await here.extended()).started()
                for _ in range(3):
                    answer = await client.ask("save")
                    assert (answer["type"], answer["of"]) == ("error", "save")
                    assert "disk did not take it" in answer["message"]
                await client.ask("keep", enabled=True)
                assert (await client.ask("pause"))["type"] == "paused"
                assert (await client.ask("list"))["memories"] == []
                await client.ws.close()

            await undisturbed(here, fail)
            assert here.server.engine.alive

    asyncio.run(asyncio.wait_for(work(), 90))
    assert names(small) == []
