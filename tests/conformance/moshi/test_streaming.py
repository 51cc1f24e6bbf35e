"""Streaming through Moshi: against training, per row, under guidance, captured and replayed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moshi_ttt.core.errors import ContextError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.streaming import stream_state
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from tests.unit.hosts.toy import (
    EmbeddingToyBlock,
    ToyBlock,
    buffers,
    generator_of,
    make_blocks,
    random_codes,
    relative_error,
    run,
    stream,
    toy_lm,
    user_codes,
)


# -------------------------------------------------------------------------------------------------- against training
@pytest.mark.parametrize("block", [ToyBlock, EmbeddingToyBlock])
def test_token_by_token_equals_one_training_forward(block):
    model = toy_lm(block=block)
    codes = random_codes(model, 2, 30)
    with torch.no_grad(), MOSHI_HOST.carry(model) as carried:
        whole = model.forward_text(codes)[1]
    with model.streaming(2):
        pieces = stream(model, codes)
        assert relative_error(pieces, whole) < 1e-4
        for site, state in carried.blocks.items():
            for name, tensor in state.items():
                assert relative_error(buffers(model, site.layer)[name].float(), tensor.float()) < 1e-4


def test_bfloat16_host_streams_with_float32_state():
    # Moshi alone differs by 3e-2 between the two forms in bfloat16: other shapes, other roundings.
    model = toy_lm(dtype=torch.bfloat16)
    codes = random_codes(model, 2, 30)
    with torch.no_grad():
        whole = model.forward_text(codes)[1]
    with model.streaming(2):
        assert relative_error(stream(model, codes), whole) < 5e-2
        assert buffers(model)["weights"].dtype == torch.float32


def test_streaming_a_wrapped_ring_cache_still_matches():
    model = toy_lm(context=8)
    codes = random_codes(model, 1, 30)
    with torch.no_grad():
        whole = model.forward_text(codes)[1]
    with model.streaming(1):
        assert relative_error(stream(model, codes), whole) < 1e-4


def test_closed_gate_streams_the_base_models_logits():
    model, base = toy_lm(), random_tiny_lm()
    for block in MOSHI_HOST.blocks(model).values():
        torch.nn.init.zeros_(block.gate)
    codes = random_codes(model, 2, 8)
    with torch.no_grad():
        assert torch.equal(model.forward_text(codes)[1], base.forward_text(codes)[1])
    with model.streaming(2), base.streaming(2):
        assert torch.equal(stream(model, codes), stream(base, codes))


# -------------------------------------------------------------------------------------------------------------- rows
def test_step_updates_the_state_and_leaves_parameters_alone():
    model = toy_lm()
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    lm_gen = generator_of(model)
    with lm_gen.streaming(2):
        before = {name: tensor.clone() for name, tensor in buffers(lm_gen).items()}
        addresses = {name: tensor.data_ptr() for name, tensor in buffers(lm_gen).items()}
        run(lm_gen, user_codes(model, 2, 9))
        after = buffers(lm_gen)
        assert not torch.equal(before["weights"], after["weights"])
        assert after["position"].tolist() == [1, 1]
        assert {name: tensor.data_ptr() for name, tensor in after.items()} == addresses
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


def test_masked_rows_hold_and_the_others_are_bit_equal():
    model = toy_lm()
    codes = user_codes(model, 3, 12)
    lm_gen = generator_of(model)
    everyone = torch.ones(3, dtype=torch.bool)
    without_1 = torch.tensor([True, False, True])
    with lm_gen.streaming(3):
        free = run(lm_gen, codes)
        free_state = {name: tensor.clone() for name, tensor in buffers(lm_gen).items()}
    with lm_gen.streaming(3):
        run(lm_gen, codes[..., :6])
        held = {name: tensor[1].clone() for name, tensor in buffers(lm_gen).items()}
        masked = run(lm_gen, codes[..., 6:], [without_1] * 6)
        for name, tensor in buffers(lm_gen).items():
            assert torch.equal(tensor[1], held[name]), name
            assert torch.equal(tensor[[0, 2]], free_state[name][[0, 2]]), name
        for ours, theirs in zip(masked, free[6:], strict=True):
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        # The held row goes on as if the masked steps had not been.
        resumed = run(lm_gen, codes[..., 6:], [everyone] * 6)
        for ours, theirs in zip(resumed, free[6:], strict=True):
            assert torch.equal(ours[1], theirs[1])


def test_reset_rows_start_over_and_the_others_are_bit_equal():
    model = toy_lm()
    codes = user_codes(model, 3, 14)
    lm_gen = generator_of(model)
    with lm_gen.streaming(3):
        free = run(lm_gen, codes)
        free_state = {name: tensor.clone() for name, tensor in buffers(lm_gen).items()}
    with lm_gen.streaming(3):
        fresh_run = run(lm_gen, codes[..., 7:])
        fresh = {name: tensor.clone() for name, tensor in buffers(lm_gen).items()}
    with lm_gen.streaming(3):
        run(lm_gen, codes[..., :7])
        lm_gen.reset_streaming(torch.tensor([False, True, False]))
        initial = MOSHI_HOST.blocks(model)[next(iter(MOSHI_HOST.blocks(model)))].initial
        assert torch.equal(buffers(lm_gen)["weights"][1], initial)
        assert buffers(lm_gen)["position"][1] == 0
        mixed = run(lm_gen, codes[..., 7:])
        for name, tensor in buffers(lm_gen).items():
            assert torch.equal(tensor[1], fresh[name][1]), name
            assert torch.equal(tensor[[0, 2]], free_state[name][[0, 2]]), name
        for ours, others, alone in zip(mixed, free[7:], fresh_run, strict=True):
            assert torch.equal(ours[[0, 2]], others[[0, 2]])
            assert torch.equal(ours[1], alone[1])


def test_a_row_equals_the_same_stream_with_the_other_slots_idle():
    model = toy_lm()
    codes = user_codes(model, 3, 10)
    lm_gen = generator_of(model)
    with lm_gen.streaming(3):
        together = run(lm_gen, codes)
        state = {name: tensor[2].clone() for name, tensor in buffers(lm_gen).items()}
    only = torch.tensor([False, False, True])
    with lm_gen.streaming(3):
        alone = run(lm_gen, codes, [only] * 10)
        assert all(torch.equal(tensor[2], state[name]) for name, tensor in buffers(lm_gen).items())
    assert all(torch.equal(a[2], b[2]) for a, b in zip(alone, together, strict=True))


def test_guidance_doubles_the_rows():
    model = toy_lm()
    lm_gen = generator_of(model, cfg_coef=2.0, cfg_is_no_text=True)
    codes = user_codes(model, 2, 10)
    with lm_gen.streaming(2):
        assert buffers(lm_gen)["weights"].shape[0] == 4
        run(lm_gen, codes[..., :5], [torch.tensor([True, False])] * 5)
        assert buffers(lm_gen)["position"].tolist() == [1, 0, 1, 0]
        run(lm_gen, codes[..., 5:], [torch.tensor([True, True])] * 5)
        assert not torch.equal(buffers(lm_gen)["weights"][0], buffers(lm_gen)["weights"][2])
        lm_gen.reset_streaming(torch.tensor([True, False]))
        assert buffers(lm_gen)["position"].tolist() == [0, 1, 0, 1]


def test_a_step_reads_no_value_on_the_host():
    model = toy_lm(block=EmbeddingToyBlock)
    lm_gen = generator_of(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes = torch.zeros(2, 8, 1, dtype=torch.long)
        lm_gen.streaming_forever(2)  # leaving it reports, which reads
        for _ in range(3):
            lm_gen.step(codes)
        # A mask or a reset may come between any two steps of a server: no read there either.
        lm_gen.set_exec_mask(torch.ones(2, dtype=torch.bool))
        lm_gen.reset_streaming(torch.ones(2, dtype=torch.bool))
        lm_gen.step(codes)


class Recorder(TorchDispatchMode):
    """Stands in for a captured CUDA graph: records kernels with their tensors, and runs them again, without Python."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.kernels:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                # The same storage: a view, or written in place.
                if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


@pytest.mark.parametrize("block", [ToyBlock, EmbeddingToyBlock])
@torch.no_grad()
def test_a_captured_step_replayed_equals_eager_steps(block):
    model = toy_lm(block=block, context=8)
    codes = random_codes(model, 2, 14)
    with model.streaming(2):
        expected = stream(model, codes)
        final = stream_state(model)
    with model.streaming(2):
        first = stream(model, codes[..., :3])
        static = codes[..., 3:4].clone()
        with Recorder() as graph:
            captured = model.forward_text(static)[1]
        out = [captured.clone()]
        for t in range(4, 14):
            static.copy_(codes[..., t : t + 1])
            graph.replay()
            out.append(captured.clone())
        assert torch.equal(torch.cat([first, *out], dim=2), expected)
        # Counters on the host are Python's, and a graph does not run Python.
        for name, tensor in stream_state(model).items():
            assert "offset_cpu" in name or torch.equal(tensor, final[name]), name


def test_cross_attention_comes_before_the_block():
    model = random_tiny_lm(cross_attention=True)
    MOSHI_HOST.attach(model, make_blocks(model, (1,)))
    layer = model.transformer.layers[1]
    order = []
    layer.self_attn.register_forward_hook(lambda *_: order.append("self"))
    layer.cross_attention.register_forward_hook(lambda *_: order.append("cross"))
    layer.ttt.register_forward_hook(lambda *_: order.append("ttt"))
    layer.norm2.register_forward_hook(lambda *_: order.append("feed_forward"))
    codes, source = random_codes(model, 2, 9), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.forward_text(codes, None, source)[1]
    assert order == ["self", "cross", "ttt", "feed_forward"]
    with torch.no_grad(), model.streaming(2):
        pieces = [model.forward_text(codes[..., t : t + 1], None, source)[1] for t in range(9)]
    assert relative_error(torch.cat(pieces, 2), whole) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_generation_loop_starts_after_a_refusal(guidance):
    model = toy_lm()
    lm_gen = generator_of(model, cfg_coef=guidance, cfg_is_no_text=True)
    with (
        MOSHI_HOST.updates(model, torch.tensor([True, False, True])),
        pytest.raises(ContextError, match="updates has 3 rows"),
    ):
        lm_gen.streaming(2)
    with lm_gen.streaming(2):
        run(lm_gen, user_codes(model, 2, 3))


@torch.no_grad()
def test_a_refused_stream_leaves_one_that_runs_alone():
    model = toy_lm()
    codes = random_codes(model, 2, 6)
    with model.streaming(2):
        expected = stream(model, codes)
    with model.streaming(2):
        first = stream(model, codes[..., :3])
        with pytest.raises(AssertionError, match="already streaming"):
            model.streaming(2)
        assert torch.equal(torch.cat([first, stream(model, codes[..., 3:])], 2), expected)
