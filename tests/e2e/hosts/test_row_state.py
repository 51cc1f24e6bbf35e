"""The state of one row in files and bytes: another process, slot and number of rows, and everything that is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.streaming import load_stream_state, save_stream_state, stream_state
from tests.conformance.moshi.slot_schedules import assert_same_state, codec, frame_of, make_slots, model_with
from tests.ranks import launch
from tests.unit.hosts.toy import generator_of, run, toy_lm, user_codes

CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
from tests.conformance.moshi.slot_schedules import frame_of, make_slots
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import SlotSettings
torch.set_num_threads(1)
folder, kind, row, rows = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
with make_slots("ttt_mlp", rows) as slots:
    slots.join(row, SlotSettings(seed=4), RowState.load(folder / f"{kind}.safetensors"))
    slots.join(0, SlotSettings(seed=77))
    out = []
    for n in range(7, 20):
        out.append(slots.tick({row: frame_of(1, n), 0: frame_of(9, n)})[row])
    out = [each for each in out if each is not None]
    save_file(
        {"tokens": torch.stack([each.tokens for each in out]), "pcm": torch.stack([each.pcm for each in out])},
        folder / "out.safetensors",
    )
    slots.save_row(row, kind).save(folder / "after.safetensors")
"""


@pytest.mark.parametrize(("kind", "row", "rows"), [("session", 1, 3), ("session", 4, 5), ("memory", 1, 3)])
@pytest.mark.first_by_default
def test_another_process_continues_a_row(tmp_path, kind, row, rows):
    with make_slots("ttt_mlp") as slots:
        slots.join(1, SlotSettings(seed=4))
        for n in range(7):
            slots.tick({1: frame_of(1, n)})
        state = slots.save_row(1, kind)
        assert state.save(tmp_path / f"{kind}.safetensors") == tmp_path / f"{kind}.safetensors"
        if kind == "memory":
            slots.restart(1)
        out = [slots.tick({1: frame_of(1, n)})[1] for n in range(7, 20)]
        after = slots.save_row(1, kind)
    root = Path(__file__).parents[3]
    (tmp_path / "child.py").write_text(CHILD)
    launch(tmp_path / "child.py", root, tmp_path, kind, row, rows, ranks=1)
    found, out = load_file(tmp_path / "out.safetensors"), [each for each in out if each is not None]
    assert torch.equal(found["tokens"], torch.stack([each.tokens for each in out]))
    pcm = torch.stack([each.pcm for each in out])
    continued = RowState.load(tmp_path / "after.safetensors")
    if rows == 3:
        assert torch.equal(found["pcm"], pcm)
        assert_same_state(continued, after)
    else:  # another number of rows is other matrix products
        assert (found["pcm"] - pcm).abs().max() < 1e-4
        assert continued.counts == after.counts
    files = {"child.py", "after.safetensors", f"{kind}.safetensors", "out.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files, "no temporary file is left"


@pytest.fixture(scope="module")
def states():
    """kind -> a state of a row of ``ttt_mlp``."""
    with make_slots("ttt_mlp") as slots:
        slots.join(0, SlotSettings(seed=2**62))
        for n in range(5):
            slots.tick({0: frame_of(1, n)})
        return {kind: slots.save_row(0, kind) for kind in ("memory", "session")}


@pytest.mark.parametrize("kind", ["memory", "session"])
def test_bytes_and_files_hold_the_same_state(states, kind, tmp_path):
    state = states[kind]
    path = state.save(tmp_path / "row.safetensors")
    for read in (RowState.from_bytes(state.to_bytes()), RowState.load(path)):
        assert_same_state(read, state)
        assert (read.frames, read.seed, read.num_bytes) == (5, 2**62, state.num_bytes)
    path.unlink()
    assert all(bool(tensor.isfinite().all()) for tensor in read.tensors.values() if tensor.is_floating_point())


def test_a_memory_is_the_fast_weights_and_what_belongs_to_them(states):
    memory, session = states["memory"].tensors, states["session"].tensors
    assert all(".ttt/buffers." in name for name in memory)
    assert memory.keys() < session.keys()
    assert {name.rpartition(".")[2] for name in memory} >= {"position", "skipped"}
    assert states["memory"].counts.updates == {3: 2}  # six tokens
    rings = [name for name in session if name.endswith("kv_cache.cache")]
    assert [session[name].shape[2] for name in rings if name.startswith("lm/")] == [6, 6, 6]


def test_a_failed_save_keeps_the_old_file(states, tmp_path, monkeypatch):
    path = states["memory"].save(tmp_path / "row.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        states["session"].save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------------- refusals
def edited(state: RowState, **metadata: str) -> bytes:
    return save(dict(state.tensors), {**state.metadata(), **metadata})


NO_STATES = ("random", "empty", "cut", "no json", "version", "format", "kind", "header", "count", "seed", "more")


@pytest.mark.parametrize("case", NO_STATES)
def test_what_is_no_state_of_a_row_is_refused(states, case, tmp_path):
    state = states["memory"]
    header = json.loads(state.metadata()["header"])
    contents, match = {
        "random": (os.urandom(500), "not a row's state"),
        "empty": (b"", "not a row's state"),
        "cut": (state.to_bytes()[:-7], "not a row's state"),
        "no json": ((3).to_bytes(8, "little") + b"{]}", "not a row's state"),
        "version": (edited(state, version="2"), "version 2 of its format.*reads version 1"),
        "format": (edited(state, format="moshi_ttt.stream_state"), "no kept memory or session"),
        "kind": (edited(state, header=json.dumps({**header, "kind": "dream"})), "damaged.*dream"),
        "header": (edited(state, header="{"), "damaged"),
        "count": (edited(state, header=json.dumps({**header, "frames": "many"})), "damaged"),
        "seed": (edited(state, header=json.dumps({**header, "seed": 5})), "its checksum is not that of what it holds"),
        "more": (edited(state, author="me"), "damaged.*author, which no version writes"),
    }[case]
    with pytest.raises(HostError, match=match):
        RowState.from_bytes(contents)
    path = tmp_path / "row.safetensors"
    path.write_bytes(contents)
    with pytest.raises(HostError, match=match.replace("not a row's state", "Cannot read")):
        RowState.load(path)


@pytest.mark.parametrize("kind", ["memory", "session"])
def test_every_changed_byte_is_noticed(states, kind):
    """Also one that leaves a number in its range, which no other check sees."""
    contents = bytearray(states[kind].to_bytes())
    positions = {*range(0, len(contents), max(1, len(contents) // 300)), *range(8, 600, 7), len(contents) - 1}
    at = contents.index(b"sha256")
    for position in {*positions, *range(at, at + 80)}:
        contents[position] ^= 1
        with pytest.raises(HostError):
            RowState.from_bytes(bytes(contents))
        contents[position] ^= 1
    assert_same_state(RowState.from_bytes(bytes(contents)), states[kind])


def test_a_file_without_a_checksum_is_of_an_earlier_version(states):
    state = states["memory"]
    metadata = {name: value for name, value in state.metadata().items() if name != "sha256"}
    assert_same_state(RowState.from_bytes(save(dict(state.tensors), metadata)), state)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(HostError, match="Cannot read"):
        RowState.load(tmp_path / "absent.safetensors")


def changed(state: RowState, name: str, change) -> RowState:
    return replace(state, tensors={**state.tensors, name: change(state.tensors[name].clone())})


def put(value):
    def write(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return write


WEIGHT = "lm/lm_model.transformer.layers.1.ttt/buffers.weight.0"
RING = "lm/lm_model.transformer.layers.0.self_attn/kv_cache.cache"
DAMAGE = {
    "missing": (
        lambda s: replace(s, tensors={k: v for k, v in s.tensors.items() if k != WEIGHT}),
        "it lacks .*weight.0",
    ),
    "unexpected": (lambda s: replace(s, tensors={**s.tensors, "more": torch.ones(1)}), "it has more, which no row has"),
    "shape": (lambda s: changed(s, WEIGHT, lambda t: t[:, :-1]), "weight.0: expected"),
    "dtype": (lambda s: changed(s, WEIGHT, lambda t: t.bfloat16()), "weight.0: expected .*float32, got .*bfloat16"),
    "nan": (lambda s: changed(s, WEIGHT, put(float("nan"))), "weight.0: not all of it is finite"),
    "token": (lambda s: changed(s, "lm/cache", put(10**6)), "cache holds 1000000: allowed is a token of this model"),
    "offset": (lambda s: changed(s, "lm/offsets", lambda t: -t), "offsets holds -6: allowed is 0 to"),
    "generator": (lambda s: changed(s, "generator", lambda t: t[:-1]), "generator: it is not the state of a generator"),
    "ring": (
        lambda s: changed(s, RING, lambda t: t.repeat(1, 1, 9, 1)),
        "kv_cache.cache: expected .*up to 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_state_is_refused_and_the_row_is_as_it_was(states, case):
    damage, match = DAMAGE[case]
    with make_slots("ttt_mlp") as slots:
        slots.join(0, SlotSettings(seed=8))
        for n in range(3):
            slots.tick({0: frame_of(2, n)})
        before = slots.save_row(0, "session")
        with pytest.raises(HostError, match=match):
            slots.join(0, SlotSettings(seed=9, volume=0.5), damage(states["session"]))
        assert_same_state(slots.save_row(0, "session"), before)
        slots.join(0, SlotSettings(), states["session"])


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("options", "other blocks or options at layers.1.sequence, layers.2.sequence"),
        ("adapter", "another adapter"),
        ("base", "another base model: weights differ"),
        ("codec", "another codec"),
    ],
)
def test_a_state_of_another_model_is_refused(states, case, match):
    with make_slots("ttt_linear" if case == "options" else "ttt_mlp") as slots:
        if case == "options":
            match = "other blocks or options at"
            given = states["memory"]
        else:
            origin = states["memory"].origin
            other = {
                "adapter": replace(origin, adapter="0" * 64),
                "base": replace(origin, model={**origin.model, "weights": "0" * 64}),
                "codec": replace(origin, codec="0" * 64),
            }[case]
            given = replace(states["session"], origin=other)
        with pytest.raises(HostError, match=match):
            slots.join(0, SlotSettings(), given)
        if case == "codec":  # a memory needs no codec
            slots.join(0, SlotSettings(), replace(states["memory"], origin=other))


def test_the_adapter_is_told_by_its_parameters():
    model = model_with("ttt_linear")
    with Slots(model, codec(), 1) as slots:
        before = slots.origin
    parameter = next(iter(model.transformer.layers[0].ttt.parameters()))
    with torch.no_grad():
        kept = parameter.clone()
        parameter.mul_(1.5)
        try:
            with Slots(model, codec(), 1) as slots:
                assert slots.origin.model == before.model
                assert slots.origin.adapter != before.adapter
        finally:
            parameter.copy_(kept)


# ---------------------------------------------------------------------------------------------------------- all rows
def test_a_damaged_stream_is_refused(tmp_path):
    model = toy_lm(context=8)
    lm_gen = generator_of(model)
    with lm_gen.streaming(1):
        run(lm_gen, user_codes(model, 1, 5))
        path = save_stream_state(tmp_path / "stream.safetensors", lm_gen)
        contents = bytearray(path.read_bytes())
        contents[-1] ^= 1
        path.write_bytes(contents)
        with pytest.raises(HostError, match=r"stream.safetensors is damaged.*Give another file"):
            load_stream_state(path, lm_gen)


@pytest.mark.parametrize("case", ["whole ring", "today"])
def test_streams_that_earlier_versions_saved_still_load(tmp_path, case):
    """They hold what lies beyond a stream's end, too: it is not taken over."""
    model = toy_lm(context=8)
    codes = user_codes(model, 2, 12)
    lm_gen = generator_of(model)
    ring = "lm_model.transformer.layers.1.self_attn/kv_cache.cache"
    with lm_gen.streaming(2):
        run(lm_gen, codes[..., :5])
        lm_gen.reset_streaming(torch.tensor([True, False]))
        run(lm_gen, codes[..., 5:7])
        path = save_stream_state(tmp_path / "stream.safetensors", lm_gen)
        if case == "whole ring":
            old = stream_state(lm_gen)
            old[ring] = model.transformer.layers[1].self_attn._streaming_state.kv_cache.cache.clone()
            old["cache"] = lm_gen._streaming_state.cache.clone()
            assert not torch.equal(old[ring], load_file(path)[ring])
            save_file(old, path, metadata={"format": "moshi_ttt.stream_state", "version": "1"})
        expected = run(lm_gen, codes[..., 7:])
    again = generator_of(model)
    with again.streaming(2):
        load_stream_state(path, again)
        kept = model.transformer.layers[1].self_attn._streaming_state.kv_cache.cache
        assert bool((kept[:, 0, :, 2:] == 0).all())
        assert bool((kept[:, 1, :, :7] != 0).all())
        assert all(torch.equal(a, b) for a, b in zip(run(again, codes[..., 7:]), expected, strict=True))
