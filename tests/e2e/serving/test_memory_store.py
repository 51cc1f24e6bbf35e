"""What is kept, for whom, how much of it, and what a killed process leaves."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from moshi_ttt.core.errors import HostError
from moshi_ttt.serving.memory_store import MemoryStore, MemoryStoreError, StoreLimits, new_owner
from moshi_ttt.serving.precision import pack, unpack
from moshi_ttt.system.folder_lock import FolderInUseError

from .fakes import fake_state

KILLS_QUICK = 12
KILLS = 50


def same(one, other):
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) and tensor.dtype == other.tensors[name].dtype
        for name, tensor in one.tensors.items()
    )


def test_what_is_kept_comes_back_bit_for_bit(tmp_path):
    store, owner, state = MemoryStore(tmp_path), new_owner(), fake_state(1.25, values=1000)
    stored, loss = store.save(owner, state)
    assert loss == 0
    assert store.listed(owner) == [stored]
    back = store.load(owner, stored.name)
    assert same(back, state)
    assert (back.kind, back.origin) == (state.kind, state.origin)
    store.delete(owner, stored.name)
    assert store.listed(owner) == []


def test_nothing_of_an_owner_is_in_the_paths(tmp_path):
    store, owner = MemoryStore(tmp_path), new_owner()
    store.save(owner, fake_state())
    assert [path for path in tmp_path.rglob("*") if owner in str(path)] == []


def test_a_foreign_memory_is_refused_as_one_that_is_not_there(tmp_path):
    store, owner, other = MemoryStore(tmp_path), new_owner(), new_owner()
    stored, _ = store.save(owner, fake_state())
    said = set()
    for name in (stored.name, "memory-" + "0" * 32):
        for method in (store.load, store.delete):
            with pytest.raises(MemoryStoreError) as caught:
                method(other, name)
            said.add(str(caught.value))
    assert len(said) == 1
    assert store.listed(other) == []
    assert store.listed(owner) == [stored]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "memory-../../x", "*", "memory-" + "0" * 32 + "\0", "a" * 5000]
)
def test_path_tricks_are_refused(tmp_path, name):
    store, owner = MemoryStore(tmp_path / "store"), new_owner()
    store.save(owner, fake_state())
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    for method in (store.load, store.delete):
        with pytest.raises(MemoryStoreError, match="no memory of that name"):
            method(owner, name)
    for owner_id in (name, "../" + owner, owner.upper() + "\n"):
        with pytest.raises(MemoryStoreError, match="32 hexadecimal"):
            store.listed(owner_id)


def test_limits(tmp_path):
    store, owner = MemoryStore(tmp_path, StoreLimits(per_owner=2, total_bytes=20_000)), new_owner()
    for _ in range(2):
        store.save(owner, fake_state())
    with pytest.raises(MemoryStoreError, match="2 of at most 2"):
        store.save(owner, fake_state())
    with pytest.raises(MemoryStoreError, match="as much as it may"):
        store.save(new_owner(), fake_state(values=5000))
    assert len(store.listed(owner)) == 2


def test_old_ones_are_removed(tmp_path):
    store, owner = MemoryStore(tmp_path, StoreLimits(max_age_sec=100)), new_owner()
    old, _ = store.save(owner, fake_state())
    new, _ = store.save(owner, fake_state())
    (path,) = tmp_path.glob(f"*/{old.name}.safetensors")
    os.utime(path, (time.time() - 101, time.time() - 101))
    assert [each.name for each in store.listed(owner)] == [new.name]
    assert not path.exists()


@pytest.mark.exhaustive  # a process, for the lock that test_run_dir.py tests too
def test_one_server_at_a_time(tmp_path):
    program = (
        "import sys, pathlib; from moshi_ttt.serving.memory_store import MemoryStore\n"
        "with MemoryStore(pathlib.Path(sys.argv[1])).opened(): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError), MemoryStore(tmp_path).opened():
            pass
        other.communicate(b"\n")
    with MemoryStore(tmp_path).opened():
        pass


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    store, owner = MemoryStore(tmp_path), new_owner()
    kept, _ = store.save(owner, fake_state())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the system refuses to write beyond, as a full disk does
    try:
        with pytest.raises(MemoryStoreError, match="disk did not take it"):
            store.save(owner, fake_state(values=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.listed(owner) == [kept]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def save_forever(folder, owner, state):
    """A process that saves until it is killed; it is forked, because importing everything takes seconds."""
    process = os.fork()
    if process:
        return process
    try:
        store = MemoryStore(folder, StoreLimits(per_owner=10**6))
        while True:
            store.save(owner, state)
    finally:
        os._exit(1)


def kill_while_saving(folder, kills):
    owner, state = new_owner(), fake_state(2.5, values=200_000)
    loaded = left = 0
    for kill in range(kills):
        process = save_forever(folder, owner, state)
        time.sleep(0.02 + 0.173 * (kill * 0.618 % 1))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        left += len(list(folder.glob("*/.*.tmp")))
        with MemoryStore(folder, StoreLimits(per_owner=10**6)).opened() as store:
            assert list(folder.glob("*/.*")) == []
            for stored in store.listed(owner):
                assert same(store.load(owner, stored.name), state)
                store.delete(owner, stored.name)
                loaded += 1
    return loaded, left


def test_kill_9_leaves_no_half_memory(tmp_path):
    loaded, _ = kill_while_saving(tmp_path, KILLS_QUICK)
    assert loaded > 0


@pytest.mark.slow
def test_kill_9_at_fifty_moments(tmp_path):
    loaded, left = kill_while_saving(tmp_path, KILLS)
    print(f"{KILLS} kills: {loaded} memories loaded, {left} half-written files cleared away")
    assert loaded > KILLS
    assert left > 0, "no kill hit a save"


# ---- smaller forms


@pytest.mark.parametrize("precision", ["difference", "bfloat16"])
def test_smaller_forms_say_what_they_lose(tmp_path, precision):
    start = fake_state(0.0, values=4000)
    state = fake_state(0.01, values=4000)
    state.tensors["weights"] += 0.01 * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    store = MemoryStore(tmp_path, precision=precision, start=start)
    owner = new_owner()
    stored, loss = store.save(owner, state)
    back = store.load(owner, stored.name)
    assert back.tensors["weights"].dtype == torch.float32
    lost = sum(float((state.tensors[n].double() - back.tensors[n].double()).square().sum()) for n in state.tensors)
    held = sum(float(state.tensors[name].double().square().sum()) for name in state.tensors)
    assert loss == pytest.approx((lost / held) ** 0.5)
    assert 0 < loss < (1e-4 if precision == "difference" else 4e-3)
    exact, _ = MemoryStore(tmp_path).save(owner, state)
    assert stored.bytes < 0.6 * exact.bytes


def test_a_session_is_exact_in_every_form(tmp_path):
    state = fake_state(0.3, kind="session", values=100)
    packed, loss = pack(state, "bfloat16")
    assert packed is state
    assert loss == 0


def test_a_difference_needs_its_start():
    state, start = fake_state(0.3, values=10), fake_state(0.0, values=10)
    with pytest.raises(HostError, match="learned start"):
        pack(state, "difference")
    packed, _ = pack(state, "difference", start)
    with pytest.raises(HostError, match="learned start"):
        unpack(packed)
