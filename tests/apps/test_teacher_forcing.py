"""Losses of a stream, frame by frame: those of one forward pass, where attention sees it all."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.apps.teacher_forcing import delayed, stream_losses
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

FRAMES = 21


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
        total = torch.full((codes.shape[0], FRAMES), torch.nan, dtype=torch.float64)
        for b in range(codes.shape[0]):
            for t in range(FRAMES):
                losses = [
                    F.cross_entropy(logits[b, k, t].float(), codes[b, first + k, t]).double()
                    for k in range(mask.shape[1])
                    if mask[b, k, t]
                ]
                if losses:
                    total[b, t] = torch.stack(losses).mean()
        found.append(total)
    return found


@pytest.mark.parametrize("variant", [None, "ttt_mlp", "gating_mlp"])
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_streamed_losses_are_those_of_one_pass(variant, piece):
    model = model_with(variant)
    codes = codes_of(model)
    streamed = stream_losses(model, codes, piece=piece)
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
