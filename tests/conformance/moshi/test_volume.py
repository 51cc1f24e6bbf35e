"""``host.volume``: how much of what blocks add is heard. What it has in common with ``updates``: test_switches.py."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import inject, parse_config
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.audio.host import AUDIO_HOST
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import TTTStreamingTransformer
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state
from tests.conformance.moshi.switches import HOST, VOLUME, codes, load, logits, sites, streamed
from tests.unit.hosts.toy import random_codes, toy_lm


@pytest.fixture(params=[False, True], ids=["tensor operations", "compiled"])
def model(request):
    return load(compiled=request.param)


@pytest.fixture
def uncompiled():
    """For calls of several tokens, in which a compiled step has no part."""
    return load()


@pytest.fixture(scope="module")
def base():
    return MOSHI_HOST.load(MOSHI_HOST.config_class(**HOST))


@pytest.mark.first_by_default
def test_a_stream_at_0_is_that_of_the_base_model_row_by_row(model, base):
    loud, _ = streamed(model)
    mixed, _ = streamed(model, VOLUME, torch.tensor([1.0, 0.0, 0.5]))
    half, _ = streamed(model, VOLUME, 0.5)
    plain, _ = streamed(base)
    assert torch.equal(streamed(model, VOLUME, 0)[0], plain)
    assert torch.equal(mixed[0], loud[0])
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[2], half[2])
    assert not torch.equal(half, loud)
    assert not torch.equal(half, plain)


def test_memory_learns_at_volume_0_as_far_as_it_hears_the_same(model):
    # The first block hears the same at every volume; the second what the first gives.
    first, *_ = streamed(model)[1]
    silent, *_ = streamed(model, VOLUME, 0)[1]
    for name, tensor in first.items():
        assert torch.equal(silent[name], tensor), name


@pytest.mark.first_by_default
def test_it_reaches_blocks_through_the_generation_loop(model, base):
    spoken = {}
    for name, volume, lm in (("silent", 0, model), ("loud", 1, model), ("rows", torch.tensor([0.0, 1.0]), model),
                             ("base", None, base)):  # fmt: skip
        generator = LMGen(lm, use_sampling=False)
        with torch.no_grad(), ExitStack() as stack:
            if volume is not None:
                stack.enter_context(MOSHI_HOST.volume(lm, volume))
            stack.enter_context(generator.streaming(2))
            steps = [generator.step(frame) for frame in codes(2)[:, 9:].split(1, -1)]
        spoken[name] = torch.cat([step for step in steps if step is not None], dim=-1)
    assert torch.equal(spoken["silent"], spoken["base"])
    assert not torch.equal(spoken["loud"], spoken["base"])
    assert torch.equal(spoken["rows"][0], spoken["base"][0])
    assert torch.equal(spoken["rows"][1], spoken["loud"][1])


def test_output_scale_and_volume_multiply(uncompiled, base):
    quiet = load(output_scale=0.25)
    with torch.no_grad():
        with MOSHI_HOST.volume(uncompiled, 0.5):
            half = logits(uncompiled)
        with MOSHI_HOST.volume(quiet, 2):
            assert torch.equal(logits(quiet), half)
        with MOSHI_HOST.volume(quiet, torch.tensor([2.0, 0.0, 2.0])):
            rows = logits(quiet)
        assert torch.equal(rows[[0, 2]], half[[0, 2]])
        assert torch.equal(rows[1], logits(base)[1])
        assert torch.equal(logits(load(output_scale=0)), logits(base))


def test_at_volume_0_no_parameter_of_a_block_has_a_gradient_but_zero(uncompiled):
    with MOSHI_HOST.volume(uncompiled, 0):
        uncompiled(codes()).logits.nan_to_num().square().mean().backward()
    for site in sites(uncompiled):
        for name, parameter in site.block.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), name


def test_it_nests_beside_updates_and_an_error_restores(uncompiled, base):
    with torch.no_grad():
        loud, plain = logits(uncompiled), logits(base)
        with MOSHI_HOST.volume(uncompiled, 0), MOSHI_HOST.updates(uncompiled, False):
            assert torch.equal(logits(uncompiled), plain)
            with MOSHI_HOST.volume(uncompiled, 1):
                frozen = logits(uncompiled)
                with MOSHI_HOST.updates(uncompiled, True):
                    assert torch.equal(logits(uncompiled), loud)
                assert torch.equal(logits(uncompiled), frozen)
            assert torch.equal(logits(uncompiled), plain)
        assert not torch.equal(frozen, loud)
        with pytest.raises(RuntimeError, match="inside"), MOSHI_HOST.volume(uncompiled, 0):
            raise RuntimeError("inside")
        assert torch.equal(logits(uncompiled), loud)


def test_a_stream_goes_on_from_a_saved_one_at_its_own_volume(model):
    with torch.no_grad(), model.streaming(3):
        with MOSHI_HOST.volume(model, 0):
            for frame in codes()[:, :, :5].split(1, -1):
                model.forward_text(frame)
            saved = stream_state(model)
            quiet = model.forward_text(codes()[:, :, 5:6])[1]
        restore_stream_state(model, saved)
        loud = model.forward_text(codes()[:, :, 5:6])[1]
        restore_stream_state(model, saved)
        with MOSHI_HOST.volume(model, 0):
            assert torch.equal(model.forward_text(codes()[:, :, 5:6])[1], quiet)
    assert not torch.equal(loud, quiet)
    assert not any("volume" in name for name in saved)


def test_blocks_without_a_volume_are_named_and_stream_as_before():
    model = toy_lm()
    tokens = random_codes(model, 2, 5)
    with torch.no_grad():
        loud = model.forward_text(tokens)[1]
        for value in (0, 0.5, torch.ones(2)):
            with (
                pytest.raises(ContextError, match=r"layers\.0\.sequence \(ToyBlock\), layers\.2\.sequence"),
                MOSHI_HOST.volume(model, value),
            ):
                pass
        with MOSHI_HOST.volume(model, 1):
            assert torch.equal(model.forward_text(tokens)[1], loud)
            with model.streaming(2):
                model.forward_text(tokens[..., :1])


def test_a_model_without_blocks_is_at_every_volume(base):
    assert not isinstance(base.transformer, TTTStreamingTransformer)
    with torch.no_grad():
        plain = logits(base)
        for volume in (0, 0.5, torch.ones(3)):
            with MOSHI_HOST.volume(base, volume):
                assert torch.equal(logits(base), plain)
    with pytest.raises(ContextError, match="got -1"), MOSHI_HOST.volume(base, -1):
        pass


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"causal": False}], ids=str)
def test_both_passes_of_a_bidirectional_block_are_at_the_volume(options):
    config = parse_config(
        {"host": {"name": "audio"}, "ttt": [{"variant": "ttt_mlp", "chunk": 8, "gate": {"init": 0.5}, **options}]},
        registry=default_registry(),
    )
    model, base = AUDIO_HOST.load(config.host), AUDIO_HOST.load(config.host)
    inject(model, config)
    x = torch.randn(3, 32 * 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loud, plain = model(x), base(x)
        assert not torch.equal(loud, plain)
        with AUDIO_HOST.volume(model, 0):
            assert torch.equal(model(x), plain)
            with AUDIO_HOST.volume(model, torch.tensor([0.0, 1.0, 0.5])):
                mixed = model(x)
        with AUDIO_HOST.volume(model, 0.5):
            half = model(x)
        assert torch.equal(model(x), loud)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], loud[1])
    assert torch.equal(mixed[2], half[2])


def test_blocks_that_are_attached_inside_are_at_volume_1(uncompiled):
    before = MOSHI_HOST.blocks(uncompiled)
    with torch.no_grad():
        loud = logits(uncompiled)
        with MOSHI_HOST.volume(uncompiled, 0):
            blocks = MOSHI_HOST.detach(uncompiled)
            MOSHI_HOST.attach(uncompiled, blocks)
            assert torch.equal(logits(uncompiled), loud)
        assert torch.equal(logits(uncompiled), loud)
    assert set(before) == set(blocks)
    MOSHI_HOST.detach(uncompiled)
    assert "_volume" not in vars(uncompiled.transformer)
