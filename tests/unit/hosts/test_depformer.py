"""The depformer's layers with a weight for each step: the same numbers, without copies of the weight."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from moshi_ttt.hosts.moshi.depformer import make_steps_contiguous
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm


def run(model, codes):
    model.zero_grad()
    out = model(codes)
    loss = out.logits[out.mask].square().mean()
    loss.backward()
    return loss.detach(), model.emb[0].weight.grad.clone()


def test_numbers_are_the_same_and_no_weight_is_copied():
    model = random_tiny_lm().requires_grad_(False)
    model.emb.requires_grad_(True)
    codes = torch.randint(0, 32, (2, 17, 11), generator=torch.Generator().manual_seed(0))
    before = run(model, codes)

    def products() -> set[str]:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            run(model, codes)
        rows = 2 * 11
        return {
            event.name
            for event in profiler.events()
            if event.name == "aten::bmm" and event.input_shapes[0][:2] == [rows, 1]
        }

    assert products(), "the premise: frozen weights are multiplied row by row"
    make_steps_contiguous(model)
    assert not products()
    after = run(model, codes)
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-8)


def test_streaming_is_as_it_was():
    from moshi.models import LMGen

    def listen(model):
        generator = LMGen(model, use_sampling=False)
        with torch.no_grad(), generator.streaming(1):
            return [generator.step(torch.full((1, 8, 1), t % 32)) for t in range(6)]

    plain, made = random_tiny_lm(), random_tiny_lm()
    make_steps_contiguous(made)
    for a, b in zip(listen(plain), listen(made), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
