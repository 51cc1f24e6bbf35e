"""The loss: weights known before the forward pass, sums that add up to moshi-finetune's weighted means."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt.hosts.moshi.losses import MoshiLosses, token_weights
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

LOSSES = MoshiLosses(first_codebook=100.0, text_padding=0.5)


@pytest.fixture(scope="module")
def model():
    return random_tiny_lm()


def codes_of(model, rows=3, frames=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 6, (rows, 1, frames), generator=generator)  # padding (3) and its end (0) among them
    audio = torch.randint(0, model.card, (rows, model.n_q, frames), generator=generator)
    codes = torch.cat([text, audio], 1)
    codes[0, :, 6:] = model.zero_token_id
    codes[1, 0] = model.zero_token_id
    codes[2, 3, 2] = model.zero_token_id
    return codes


def by_definition(model, codes):
    """Every token on its own: (text, audio, text nats, audio nats) sums and (weight, weight, tokens, tokens)."""
    out = model(codes)
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for part, (logits, mask, first) in enumerate(((out.text_logits, out.text_mask, 0), (out.logits, out.mask, 1))):
        for b, k, t in mask.nonzero().tolist():
            target = int(codes[b, first + k, t])
            weight = 1.0
            if part == 0 and target in (model.text_padding_token_id, model.end_of_text_padding_id):
                weight = LOSSES.text_padding
            if part == 1 and k == 0:
                weight = LOSSES.first_codebook
            loss = F.cross_entropy(logits[b, k, t].float(), torch.tensor(target)).double()
            sums[part] += weight * loss
            sums[2 + part] += loss
            counts[part] += weight
            counts[2 + part] += 1
    return sums.detach().view(2, 2), counts.view(2, 2)


def test_sums_and_counts_are_those_of_the_definition(model):
    codes = codes_of(model)
    sums, counts = by_definition(model, codes)
    assert torch.equal(LOSSES.weights(model, codes), counts)
    torch.testing.assert_close(LOSSES.sums(model, codes).detach().double(), sums, rtol=1e-5, atol=0)


def test_weights_are_zero_exactly_where_the_model_predicts_nothing(model):
    codes = codes_of(model)
    out = model(codes)
    text, audio = token_weights(model, codes, LOSSES)
    assert torch.equal(text > 0, out.text_mask)
    assert torch.equal(audio > 0, out.mask)


def test_the_first_codebook_of_each_predicted_voice_counts_more():
    voice = [0, 1, 1, 1, 1, 1, 1, 1]
    both = random_tiny_lm(n_q=16, dep_q=16, delays=[0, *voice, *voice])
    _, audio = token_weights(both, codes_of(both)[2:, :, :6], LOSSES)
    assert audio[0, :, 0].tolist() == ([100.0] + [1.0] * 7) * 2


def test_sums_add_up_over_rows(model):
    codes = codes_of(model)
    whole = LOSSES.sums(model, codes).detach()
    parts = sum(LOSSES.sums(model, codes[b : b + 1]).detach() for b in range(3))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_nothing_to_predict_is_zero_and_has_a_gradient(model):
    codes = torch.full((1, model.num_codebooks, 4), model.zero_token_id)
    assert LOSSES.weights(model, codes).tolist() == [[0.0] * 2] * 2
    sums = LOSSES.sums(model, codes)
    assert sums.tolist() == [[0.0] * 2] * 2
    sums[0].sum().backward()


def test_weights_of_zero_leave_tokens_out(model):
    codes = codes_of(model)
    silent = MoshiLosses(first_codebook=0.0, text_padding=0.0)
    counts = silent.weights(model, codes)
    first = int((codes[:, 1] != model.zero_token_id).sum())  # the first codebook has no delay
    assert counts[1, 1] == LOSSES.weights(model, codes)[1, 1] - first
    assert counts[1, 0] < LOSSES.weights(model, codes)[1, 0]
