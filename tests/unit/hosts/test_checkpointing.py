"""Activation checkpointing of layers with blocks: parts, each computed again once and in its turn."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt import default_registry, make_plan
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

SEQUENCE = {"variant": "ttt_linear", "layers": "1", "chunk": 4}
FEED_FORWARD = {"variant": "gating_mlp", "layers": "1", "chunk": 4}


def made(*entries, cross_attention: bool = False, checkpointing: bool):
    """A model with blocks in its second layer, and none in the others."""
    model = random_tiny_lm(gradient_checkpointing=checkpointing, cross_attention=cross_attention)
    registry = default_registry()
    parsed = [parse_block(dict(entry), registry=registry) for entry in entries]
    plan = make_plan(model, MOSHI_HOST, parsed, policy=registry.policy("fp32_state"), registry=registry)
    plan.apply(model)
    return model.train()


def given(model, *, cross_attention: bool = False):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, model.dim, generator=draw, requires_grad=True)
    source = torch.randn(2, 3, model.dim, generator=draw, requires_grad=True) if cross_attention else None
    return x, source


@pytest.mark.parametrize("cross_attention", [False, True])
@pytest.mark.parametrize(
    "entries", [(SEQUENCE,), (FEED_FORWARD,), (SEQUENCE, FEED_FORWARD)], ids=["sequence", "feed_forward", "both"]
)
def test_gradients_are_bit_equal_to_those_without(entries, cross_attention):
    found = []
    for checkpointing in (False, True):
        model = made(*entries, cross_attention=cross_attention, checkpointing=checkpointing)
        x, source = given(model, cross_attention=cross_attention)
        y = model.transformer(x, cross_attention_src=source)
        y.square().mean().backward()
        parameters = [p for p in model.transformer.parameters() if p.grad is not None]
        inputs = [each.grad for each in (x, source) if each is not None]
        found.append([y.detach(), *inputs, *(p.grad for p in parameters)])
    plain, checkpointed = found
    assert len(plain) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_a_part_is_computed_again_once_and_after_those_behind_it_have_their_gradients():
    """What the feed-forward keeps for its gradients is free before the block is computed again, and so on."""
    model, events = made(SEQUENCE, checkpointing=True), []
    layer = model.transformer.layers[1]
    for name, part in (("attention", layer.self_attn), ("block", layer.ttt), ("feed-forward", layer.gating)):
        part.register_forward_pre_hook(lambda module, inputs, name=name: events.append(name))

    def watch(module, inputs, y):
        if len(events) < 3:  # the block's input and output in the forward pass, not when they are computed again
            inputs[0].register_hook(lambda gradient: events.append("behind attention: done"))
            y.register_hook(lambda gradient: events.append("behind the block: done"))

    layer.ttt.register_forward_hook(watch)
    x, _ = given(model)
    y = model.transformer(x)
    assert events == ["attention", "block", "feed-forward"]
    events.clear()
    y.square().mean().backward()
    assert events == ["feed-forward", "behind the block: done", "block", "behind attention: done", "attention"]


def test_a_layer_without_a_block_is_computed_again_as_a_whole():
    model, calls = made(SEQUENCE, checkpointing=True), []
    layer = model.transformer.layers[0]
    for part in (layer.self_attn, layer.gating):
        part.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    x, _ = given(model)
    y = model.transformer(x)
    y.square().mean().backward()
    assert calls == [layer.self_attn, layer.gating] * 2


@pytest.mark.parametrize("index", [0, 1], ids=["a layer without a block", "a layer with one"])
def test_a_pass_that_failed_leaves_nothing_behind(index):
    model = made(SEQUENCE, checkpointing=True)
    x, _ = given(model)
    expected = model.transformer(x)

    def fails(module, inputs):
        raise RuntimeError("the feed-forward failed")

    layer = model.transformer.layers[index]
    hook = layer.gating.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="the feed-forward failed"):
        model.transformer(x)
    hook.remove()
    assert model.transformer.checkpointing
    assert (layer._context, layer._by_parts) == (None, False)
    assert torch.equal(model.transformer(x), expected)
