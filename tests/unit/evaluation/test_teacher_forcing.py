"""Losses frame by frame: of a stream, those of one forward pass; of segments, those of training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.errors import ContextError
from moshi_ttt.evaluation.teacher_forcing import forward_losses, segment_losses, stream_losses
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.losses import MoshiLosses, delayed
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

pytestmark = pytest.mark.each_kind

FRAMES = 21
VARIANTS = [None, "ttt_mlp", "gating_mlp"]


def model_with(variant: str | None):
    model = random_tiny_lm()
    if variant:
        host = {"name": "moshi", "hf_repo": "builtin:tiny"}
        config = parse_config(
            {"host": host, "ttt": [{"variant": variant, "layers": "1", "chunk": 4}]}, registry=default_registry()
        )
        for parameter in inject(model, config).parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def codes_of(model, rows=2):
    codes = torch.randint(0, 32, (rows, model.num_codebooks, FRAMES), generator=torch.Generator().manual_seed(0))
    codes[-1, :, 13:] = model.zero_token_id
    codes[0, 0, :5] = model.zero_token_id
    return codes


def by_definition(model, codes):
    """Of one forward pass, every token on its own."""
    with torch.no_grad():
        out = model(codes)
    found = []
    for logits, mask, first in ((out.text_logits, out.text_mask, 0), (out.logits, out.mask, 1)):
        total = torch.full((codes.shape[0], codes.shape[2]), torch.nan, dtype=torch.float64)
        for b in range(codes.shape[0]):
            for t in range(codes.shape[2]):
                losses = [
                    F.cross_entropy(logits[b, k, t].float(), codes[b, first + k, t]).double()
                    for k in range(mask.shape[1])
                    if mask[b, k, t]
                ]
                if losses:
                    total[b, t] = torch.stack(losses).mean()
        found.append(total)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_streamed_losses_are_those_of_one_pass(variant, at_once):
    model = model_with(variant)
    codes = codes_of(model)
    streamed = stream_losses(model, codes, at_once=at_once)
    for actual, expected in zip(streamed, by_definition(model, codes), strict=True):
        assert actual.shape == (2, FRAMES)
        assert torch.equal(actual.isnan(), expected.isnan())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_rows_are_streams_of_their_own():
    model = model_with("ttt_mlp")
    codes = codes_of(model)
    together = stream_losses(model, codes)
    for row in range(2):
        alone = stream_losses(model, codes[row : row + 1])
        torch.testing.assert_close(alone.audio[0], together.audio[row], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_caller_is_called_before_each_frame_and_nothing_is_left_behind():
    model = model_with("ttt_mlp")
    codes, seen = codes_of(model), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = stream_losses(model, codes, before=seen.append)
    assert seen == list(range(FRAMES))
    second = stream_losses(model, codes)
    assert torch.equal(first.audio.nan_to_num(), second.audio.nan_to_num())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.is_streaming


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [FRAMES, FRAMES + 5])
def test_one_segment_is_a_stream(variant, frames):
    model = model_with(variant)
    codes = codes_of(model)
    for actual, expected in zip(
        segment_losses(model, codes, MOSHI_HOST, frames=frames), stream_losses(model, codes), strict=True
    ):
        assert torch.equal(actual.isnan(), expected.isnan())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frames", [5, 7, FRAMES - 1])
def test_segments_lose_what_training_loses_token_for_token(variant, frames):
    model = model_with(variant)
    codes = codes_of(model)
    found = segment_losses(model, codes, MOSHI_HOST, frames=frames)
    state, text, audio = None, [], []
    losses = MoshiLosses()
    ids, sums, counts = torch.zeros(2, dtype=torch.int64), 0, 0
    for segment in codes.split(frames, dim=2):  # as Trainer.evaluate does
        with MOSHI_HOST.carry(model, state, document_ids=ids) as after:
            parts = by_definition(model, segment)
        with MOSHI_HOST.carry(model, state, document_ids=ids), torch.no_grad():
            sums = sums + losses.sums(model, segment).double()
        counts = counts + losses.weights(model, segment)
        state = after
        text.append(parts[0])
        audio.append(parts[1])
    for actual, expected in zip(found, (torch.cat(text, 1), torch.cat(audio, 1)), strict=True):
        assert actual.shape == (2, FRAMES)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert int((~found.text.isnan()).sum()) == int(counts[1, 0])
    torch.testing.assert_close(found.text.nansum(), sums[1, 0], rtol=1e-5, atol=1e-5)


def test_between_segments_the_caller_decides_what_is_carried():
    model = model_with("ttt_mlp")
    codes, seen = codes_of(model), []

    def forget(frame, state):
        seen.append((frame, sorted(state.blocks)))

    losses_of = segment_losses(model, codes, MOSHI_HOST, frames=8, between=forget)
    sites = sorted(MOSHI_HOST.blocks(model))
    assert seen == [(8, sites), (16, sites)]
    for first in (0, 8, 16):
        alone = segment_losses(model, codes[:, :, first : first + 8], MOSHI_HOST, frames=8)
        assert torch.equal(alone.audio.nan_to_num(), losses_of.audio[:, first : first + 8].nan_to_num())
    carried = segment_losses(model, codes, MOSHI_HOST, frames=8)
    assert torch.equal(carried.audio[:, :8].nan_to_num(), losses_of.audio[:, :8].nan_to_num())
    assert not torch.equal(carried.audio[:, 8:].nan_to_num(), losses_of.audio[:, 8:].nan_to_num())


def test_segments_leave_nothing_behind_also_when_they_fail():
    model = model_with("ttt_mlp")
    codes = codes_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    streamed = stream_losses(model, codes).audio
    first = segment_losses(model, codes, MOSHI_HOST, frames=8).audio

    def lose_a_row(frame, state):
        return type(state)({site: {k: v[:1] for k, v in block.items()} for site, block in state.blocks.items()})

    with pytest.raises(ContextError, match="2 rows and a state of 1"):
        segment_losses(model, codes, MOSHI_HOST, frames=8, between=lose_a_row)
    assert torch.equal(segment_losses(model, codes, MOSHI_HOST, frames=8).audio.nan_to_num(), first.nan_to_num())
    assert torch.equal(stream_losses(model, codes).audio.nan_to_num(), streamed.nan_to_num())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_delays_and_start_tokens():
    model = random_tiny_lm()
    codes = codes_of(model)
    sequence = delayed(model, codes)
    assert sequence.shape == (2, model.num_codebooks, FRAMES + 1)
    for row, delay in enumerate(model.delays):
        start = model.text_initial_token_id if row == 0 else model.initial_token_id
        assert (sequence[:, row, : 1 + delay] == start).all()
        assert torch.equal(sequence[:, row, 1 + delay :], codes[:, row, : FRAMES - delay])
    assert torch.equal(delayed(model, codes[0]), sequence[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_passes_start_from_one_state(variant):
    model = model_with(variant)
    first, second = codes_of(model).split((12, 9), dim=2)
    _, state = forward_losses(model, first, MOSHI_HOST)
    kept = {site: {name: each.clone() for name, each in block.items()} for site, block in state.blocks.items()}
    once, after = forward_losses(model, second, MOSHI_HOST, state)
    again, _ = forward_losses(model, second, MOSHI_HOST, state)
    whole = segment_losses(model, torch.cat([first, second], 2), MOSHI_HOST, frames=12)
    for name in ("text", "audio"):
        assert torch.equal(getattr(once, name).nan_to_num(), getattr(again, name).nan_to_num())
        assert torch.equal(getattr(once, name).nan_to_num(), getattr(whole, name)[:, 12:].nan_to_num())
    for site, block in kept.items():
        assert all(torch.equal(each, state.blocks[site][name]) for name, each in block.items())
        assert any(not torch.equal(each, after.blocks[site][name]) for name, each in block.items())
