"""Everything that streams, saved and restored: in place, in another process, in the middle of a chunk."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.streaming import (
    load_stream_state,
    restore_stream_state,
    save_stream_state,
    stream_state,
)
from moshi_ttt.hosts.moshi.tiny import CROSS_CONDITION
from moshi_ttt.hosts.moshi.upstream import ConditionType, LMGen
from tests.ranks import launch
from tests.unit.hosts import toy
from tests.unit.hosts.toy import (
    EmbeddingToyBlock,
    ToyBlock,
    buffers,
    generator_of,
    random_codes,
    run,
    stream,
    toy_lm,
    user_codes,
)


def with_source(model) -> LMGen:
    source = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    condition = ConditionType(source, torch.ones(2, 5, dtype=torch.bool))
    return generator_of(model, condition_tensors={CROSS_CONDITION: condition})


@pytest.mark.parametrize("case", ["plain", "guidance", "cross_attention", "embeddings"])
def test_restored_stream_continues_bit_equal(case):
    block = EmbeddingToyBlock if case == "embeddings" else ToyBlock
    model = toy_lm(context=8, block=block, cross_attention=case == "cross_attention")

    def make():
        if case == "cross_attention":
            return with_source(model)
        return generator_of(model, **({"cfg_coef": 2.0, "cfg_is_no_text": True} if case == "guidance" else {}))

    codes = user_codes(model, 2, 21)
    masks = [torch.tensor([t % 3 != 0, True]) for t in range(21)]  # rows at different places in their chunks
    lm_gen = make()
    with lm_gen.streaming(2):
        run(lm_gen, codes[..., :10], masks[:10])
        saved = stream_state(lm_gen)
        expected = run(lm_gen, codes[..., 10:], masks[10:])
        final = stream_state(lm_gen)
    assert saved["lm_model.transformer.layers.0.ttt/buffers.position"][:2].tolist() == [2, 2]
    lm_gen = make()
    with lm_gen.streaming(2):
        restore_stream_state(lm_gen, saved)
        continued = run(lm_gen, codes[..., 10:], masks[10:])
        assert all(torch.equal(a, b) for a, b in zip(continued, expected, strict=True))
        for name, tensor in stream_state(lm_gen).items():
            assert torch.equal(tensor, final[name]), name


def test_restore_writes_in_place_and_copies():
    model = toy_lm()
    lm_gen = generator_of(model)
    codes = user_codes(model, 1, 5)
    with lm_gen.streaming(1):
        run(lm_gen, codes)
        saved = stream_state(lm_gen)
        kept = {name: tensor.clone() for name, tensor in saved.items()}
        run(lm_gen, codes)
        cache = model.transformer.layers[1].self_attn._streaming_state.kv_cache.cache
        addresses = (cache.data_ptr(), buffers(lm_gen)["weights"].data_ptr())
        restore_stream_state(lm_gen, saved)
        assert (cache.data_ptr(), buffers(lm_gen)["weights"].data_ptr()) == addresses
        run(lm_gen, codes)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


def test_stream_state_of_the_language_model_alone():
    model = toy_lm()
    codes = random_codes(model, 2, 12)
    with model.streaming(2):
        stream(model, codes[..., :6])
        saved = stream_state(model)
        expected = stream(model, codes[..., 6:])
    assert "transformer.layers.0.self_attn/kv_cache.cache" in saved
    with model.streaming(2):
        restore_stream_state(model, saved)
        assert torch.equal(stream(model, codes[..., 6:]), expected)


CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, str(Path(sys.argv[1]).parent))
import toy
from moshi_ttt.hosts.moshi import load_stream_state
from moshi_ttt.hosts.moshi.upstream import LMGen
torch.set_num_threads(1)
folder = Path(sys.argv[2])
codes = load_file(folder / "codes.safetensors")["codes"]
lm_gen = LMGen(toy.toy_lm(), use_sampling=False, support_out_of_sync=True)
with lm_gen.streaming(2):
    load_stream_state(folder / "stream.safetensors", lm_gen)
    out = torch.stack([lm_gen.step(codes[..., t : t + 1]) for t in range(codes.shape[-1])])
save_file({"out": out}, folder / "out.safetensors")
"""


def test_another_process_continues_mid_chunk(tmp_path):
    model = toy_lm()
    codes = user_codes(model, 2, 14)
    lm_gen = generator_of(model)
    with lm_gen.streaming(2):
        run(lm_gen, codes[..., :7])
        assert buffers(lm_gen)["position"].tolist() == [3, 3]
        save_stream_state(tmp_path / "stream.safetensors", lm_gen)
        expected = torch.stack(run(lm_gen, codes[..., 7:]))
    save_file({"codes": codes[..., 7:].contiguous()}, tmp_path / "codes.safetensors")
    (tmp_path / "child.py").write_text(CHILD)
    launch(tmp_path / "child.py", toy.__file__, tmp_path, ranks=1)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], expected)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "child.py", "codes.safetensors", "out.safetensors", "stream.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "dtype", "batch", "counter"])
def test_restore_refuses_and_writes_nothing(case):
    model = toy_lm()
    lm_gen = generator_of(model)
    name = "lm_model.transformer.layers.2.ttt/buffers.weights"
    with lm_gen.streaming(2):
        run(lm_gen, user_codes(model, 2, 5))
        saved = stream_state(lm_gen)
    if case == "missing":
        del saved[name]
    elif case == "unexpected":
        saved["lm_model.more"] = torch.zeros(2)
    elif case == "shape":
        saved[name] = saved[name][:, :-1]
    elif case == "dtype":
        saved[name] = saved[name].bfloat16()
    elif case == "counter":
        saved["offset_cpu"] = torch.zeros(1, dtype=torch.int64)
    rows = 3 if case == "batch" else 2
    with lm_gen.streaming(rows):
        before = stream_state(lm_gen)
        match = {"missing": "missing", "unexpected": r"unexpected lm_model\.more"}.get(case, "expected")
        with pytest.raises(HostError, match=match):
            restore_stream_state(lm_gen, saved)
        assert all(torch.equal(tensor, before[name]) for name, tensor in stream_state(lm_gen).items())


def test_restore_without_the_blocks_raises():
    model = toy_lm()
    with model.streaming(1):
        saved = stream_state(model)
    MOSHI_HOST.detach(model)
    with model.streaming(1), pytest.raises(HostError, match="unexpected"):
        restore_stream_state(model, saved)


def test_stream_state_refusals(tmp_path):
    model = toy_lm()
    with pytest.raises(HostError, match="not streaming"):
        stream_state(model)
    with pytest.raises(HostError, match="LMGen or an LMModel"):
        stream_state(model.transformer)
    with model.streaming(1):
        with pytest.raises(HostError, match="Cannot read"):
            load_stream_state(tmp_path / "absent.safetensors", model)
        (tmp_path / "cut.safetensors").write_bytes(save_stream_state(tmp_path / "s", model).read_bytes()[:-9])
        with pytest.raises(HostError, match="Cannot read"):
            load_stream_state(tmp_path / "cut.safetensors", model)
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(HostError, match="not a stream state"):
            load_stream_state(tmp_path / "other.safetensors", model)
        model.transformer._streaming_state.surprise = object()
        with pytest.raises(HostError, match="surprise holds a object"):
            stream_state(model)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model = toy_lm()
    path = tmp_path / "stream.safetensors"
    with model.streaming(1):
        save_stream_state(path, model)
        before = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_stream_state(path, model)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
