"""The variants through Moshi's own generation loop, on the tiny Moshi that ships."""

from __future__ import annotations

import warnings

import pytest
import torch
from moshi.models import LMGen
from torch._subclasses.fake_tensor import FakeTensorMode

from moshi_ttt.core.testing import error
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import block_sites
from moshi_ttt.hosts.moshi.streaming import load_stream_state, save_stream_state, stream_state

from .conftest import tiny_with

pytestmark = pytest.mark.each_kind

STEPS = 21


def user_codes(batch: int, steps: int = STEPS, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (batch, 8, steps), generator=torch.Generator().manual_seed(seed))


def generate(model, codes, **options):
    """What the model was fed and its text logits, ``[B, 17, T]`` and ``[B, T, V]``, while LMGen generates greedily."""
    inputs, logits = [], []
    plain = model.forward_text

    def recorded(sequence, *rest):
        out = plain(sequence, *rest)
        inputs.append(sequence.clone())
        logits.append(out[1][:, 0])
        return out

    model.forward_text = recorded
    try:
        generator = LMGen(model, use_sampling=False, **options)
        with generator.streaming(codes.shape[0]):
            for t in range(codes.shape[-1]):
                generator.step(codes[..., t : t + 1])
    finally:
        del model.forward_text
    return torch.cat(inputs, dim=-1), torch.cat(logits, dim=1)


@pytest.mark.first_by_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generation_sees_the_logits_that_training_would(variant, dtype):
    model, _ = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4}, dtype=dtype)
    inputs, streamed = generate(model, user_codes(2))
    with torch.no_grad():
        whole = model.forward_text(inputs)[1][:, 0]
        frozen = tiny_with({"variant": variant, "layers": "none"}, dtype=dtype)[0].forward_text(inputs)[1][:, 0]
    # bfloat16: each of the host's layers rounds its output, and T = 1 rounds differently from T = 21
    assert error(streamed, whole) < (1e-4 if dtype == torch.float32 else 5e-2)
    assert error(whole, frozen) > 1e-2, "the blocks take part"


def compiled_gating(dtype=torch.float32):
    model, injection = tiny_with({"variant": "gating_mlp", "layers": "1,3", "chunk": 4}, dtype=dtype)
    for block in injection.blocks.values():
        block.compile_step()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_steps_generate_what_training_would(dtype):
    model = compiled_gating(dtype)
    inputs, streamed = generate(model, user_codes(2))
    with torch.no_grad():
        whole = model.forward_text(inputs)[1][:, 0]
    assert error(streamed, whole) < (1e-4 if dtype == torch.float32 else 5e-2)


def test_a_saved_stream_goes_on_in_compiled_steps(tmp_path):
    plain, _ = tiny_with({"variant": "gating_mlp", "layers": "1,3", "chunk": 4})
    codes = user_codes(2)
    generator = LMGen(plain, use_sampling=False, support_out_of_sync=True)
    with generator.streaming(2):
        for t in range(10):
            generator.step(codes[..., t : t + 1])
        path = save_stream_state(tmp_path / "stream.safetensors", generator)
        for t in range(10, STEPS):
            generator.step(codes[..., t : t + 1])
        expected = stream_state(generator)
    again = LMGen(compiled_gating(), use_sampling=False, support_out_of_sync=True)
    with again.streaming(2):
        load_stream_state(path, again)
        for t in range(10, STEPS):
            again.step(codes[..., t : t + 1])
        actual = stream_state(again)
    kept = [name for name in expected if "/buffers." in name]
    assert kept
    assert all(error(actual[name].float(), expected[name].float()) < 1e-4 for name in kept)


def test_guidance_gives_every_row_of_the_doubled_batch_its_own_state(variant):
    model, _ = tiny_with({"variant": variant, "layers": "last:1", "chunk": 4})
    generator = LMGen(model, use_sampling=False, cfg_coef=2.0, cfg_is_no_text=True)
    codes = user_codes(2)
    with generator.streaming(2):
        for t in range(10):
            generator.step(codes[..., t : t + 1])
        (site,) = block_sites(model.transformer.layers[3])
        state = site._streaming_state.buffers
        name = {"gating_mlp": "values", "ttt_ridge": "covariance"}.get(variant, "weight.0")
        first, second, masked_first, _ = state[name]
        assert not torch.equal(first, second)
        assert not torch.equal(first, masked_first), "the row without text has a state of its own"


@pytest.mark.first_by_default
def test_a_step_reads_no_value_on_the_host(variant):
    model, _ = tiny_with({"variant": variant, "layers": "all", "chunk": 2})
    with FakeTensorMode(allow_non_fake_inputs=True):
        generator = LMGen(model, use_sampling=False, support_out_of_sync=True)
        generator.streaming_forever(2)  # leaving it reports, which reads
        for _ in range(3):
            generator.step(torch.zeros(2, 8, 1, dtype=torch.long))
        generator.set_exec_mask(torch.ones(2, dtype=torch.bool))
        generator.reset_streaming(torch.ones(2, dtype=torch.bool))


@pytest.mark.first_by_default
def test_a_stream_saved_mid_chunk_goes_on_bit_equal(variant, tmp_path):
    model, _ = tiny_with({"variant": variant, "layers": "last:2", "chunk": 4})
    codes = user_codes(2)
    generator = LMGen(model, use_sampling=False, support_out_of_sync=True)
    with generator.streaming(2):
        for t in range(10):  # ten steps: two and a half chunks
            generator.step(codes[..., t : t + 1])
        path = save_stream_state(tmp_path / "stream.safetensors", generator)
        expected = [generator.step(codes[..., t : t + 1]) for t in range(10, STEPS)]
    other, _ = tiny_with({"variant": variant, "layers": "last:2", "chunk": 4})
    again = LMGen(other, use_sampling=False, support_out_of_sync=True)
    with again.streaming(2):
        load_stream_state(path, again)
        actual = [again.step(codes[..., t : t + 1]) for t in range(10, STEPS)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_bfloat16_model_streams_with_float32_state(variant):
    model, _ = tiny_with({"variant": variant, "layers": "last:1", "chunk": 4}, dtype=torch.bfloat16)
    generator = LMGen(model, use_sampling=False)
    with generator.streaming(1):
        for t in range(9):
            generator.step(user_codes(1)[..., t : t + 1])
        kept = {name: t for name, t in stream_state(generator).items() if "/buffers." in name}
        assert len(kept) > 3
        for name, tensor in kept.items():
            assert tensor.dtype in (torch.float32, torch.int64), name


def test_updates_that_were_skipped_are_reported_when_streaming_ends():
    config = {"variant": "gating_mlp", "layers": "2", "chunk": 4}
    model, _ = tiny_with({**config, "lr": 1e20})
    generator = LMGen(model, use_sampling=False)
    with pytest.warns(UserWarning, match=r"layers\.2\.feed_forward: updates were skipped.*\[2, 2\].*Lower"):
        _stream(generator, frames=9)
    model, _ = tiny_with(config)
    generator = LMGen(model, use_sampling=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _stream(generator, frames=9)


@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp", "ttt_multilayer"])
def test_hybrid_updates_that_were_skipped_are_reported_when_streaming_ends(variant):
    model, injection = tiny_with({"variant": variant, "layers": "2", "chunk": 4})
    (block,) = injection.blocks.values()
    generator = LMGen(model, use_sampling=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _stream(generator, frames=9)
    block.inner_lr_factor = 1e20
    with pytest.warns(UserWarning, match=r"layers\.2\.sequence: updates were skipped.*\[2, 2\].*Lower"):
        _stream(generator, frames=9)


def test_tokens_that_ttt_ridge_left_out_are_reported_without_advice_on_a_learning_rate():
    model, _ = tiny_with({"variant": "ttt_ridge", "layers": "2", "chunk": 4})
    with torch.no_grad():
        model.text_emb.weight.fill_(float("nan"))
    generator = LMGen(model, use_sampling=False)
    with pytest.warns(UserWarning, match=r"updates were skipped.*\[9, 9\]\. Look at") as caught:
        _stream(generator, frames=9)
    assert not any("learning rate" in str(each.message) for each in caught)
    with warnings.catch_warnings(), MOSHI_HOST.updates(model, False):
        warnings.simplefilter("error")
        _stream(generator, frames=9)


def _stream(generator, frames):
    with generator.streaming(2):
        for _ in range(frames):
            generator.step(user_codes(2)[..., :1])


def test_updates_skipped_before_a_reset_are_reported_too():
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "2", "chunk": 4, "lr": 1e20})
    generator = LMGen(model, use_sampling=False)

    def two_callers():
        with generator.streaming(2):
            for t in range(9):
                generator.step(user_codes(2)[..., :1])
                if t == 7:
                    generator.reset_streaming(torch.tensor([True, False]))

    with pytest.warns(UserWarning, match=r"updates were skipped.*\[2, 2\]"):
        two_callers()


def test_updates_skipped_before_memory_is_reset_are_reported_too():
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "2", "chunk": 4, "lr": 1e20})
    generator = LMGen(model, use_sampling=False)

    def interrupted():
        with generator.streaming(2):
            for t in range(9):
                generator.step(user_codes(2)[..., :1])
                if t == 7:
                    for layer in model.transformer.layers:
                        for site in block_sites(layer):
                            site._streaming_state.forget()

    with pytest.warns(UserWarning, match=r"updates were skipped.*\[2, 2\]"):
        interrupted()
