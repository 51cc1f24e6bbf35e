"""The reversed pass on a grid and behind a prefix, against the published layer's definition written out here.

Dalal et al. 2025, arXiv:2504.05298: a text's tokens stand before a video's; RoPE turns the video's alone, each by the
place it stands at; the reversed pass hears the text in order, then the video backwards, by the same rotations.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.format import GridFormat, PrefixedGridFormat, SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.weight_map import export_weights, import_weights
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop, naive_output
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.plugins.ttt_mlp.block import TTTMLP
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig
from tests.conformance.variants.test_hybrid import build

DIM, HEADS, GRID = 32, 2, (2, 3, 4)
WIDTH, TOKENS = DIM // HEADS, 2 * 3 * 4


def block_of(layout, seed=0, **options):
    config = TTTMLPConfig(**{"chunk": 4, "bidirectional": True, "expansion": 2, **options})
    info = SiteInfo(
        site=Site(0, SiteKind.SEQUENCE), dim=DIM, num_heads=HEADS, device=torch.device("cpu"), dtype=torch.float64,
        format=layout,
    )  # fmt: skip
    block = TTTMLP(config, info, FP32_STATE.roles(torch.float64))
    generator = torch.Generator().manual_seed(seed)
    block.reset_parameters(generator)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block


def turned(x, places, theta=10_000.0):
    """``x [B, H, T, Dh]``: a quarter of the pairs turned by the frame, three eighths each by the row and the column."""
    x, start = x.clone(), 0
    for axis, width in enumerate((WIDTH // 4, 3 * WIDTH // 8, 3 * WIDTH // 8)):
        for pair, slot in itertools.product(range(width // 2), range(x.shape[2])):
            angle = torch.tensor(places[slot][axis] * theta ** (-2 * pair / width), dtype=x.dtype)
            a, b = x[:, :, slot, start + 2 * pair].clone(), x[:, :, slot, start + 2 * pair + 1].clone()
            x[:, :, slot, start + 2 * pair] = a * angle.cos() - b * angle.sin()
            x[:, :, slot, start + 2 * pair + 1] = a * angle.sin() + b * angle.cos()
        start += width
    return x


def one_pass(given, x, gate, places, config):
    """The layer over ``x [B, T, D]`` in the order it is in: slot by slot, fast weights by autograd."""

    def heads(name):
        projected = x @ given[f"{name}.weight"].T + given[f"{name}.bias"]
        return projected.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    q, k = (turned(part / part.norm(dim=-1, keepdim=True), places) for part in (heads("wq"), heads("wk")))
    difference = heads("wv") - k
    normal = (difference - difference.mean(-1, keepdim=True)) / (difference.std(-1, keepdim=True) + config.target_eps)
    v = given["norm_weight"][:, None] * normal + given["norm_bias"][:, None] + k
    rate = torch.einsum("btd,hd->bht", x, given["lr_weight"][:, 0]) + given["lr_bias"]
    fast = [[given[f"fast_{part}.{layer}"] for layer in range(2)] for part in ("weight", "bias")]
    y, _, _ = naive_inner_loop(
        q, k, v, config.base_lr * torch.sigmoid(rate) / WIDTH, torch.ones(config.chunk).to(x) / config.chunk,
        given["norm_weight"], given["norm_bias"], *fast, chunk_size=config.chunk, eps=config.norm_eps, causal=False,
    )  # fmt: skip
    return naive_output(x, y, {**given, "alpha": gate}, eps=config.post_norm_eps).detach()


def published(block, x, prefix, grid=GRID):
    """Both passes over ``x [B, prefix + tokens of the grid, D]``."""
    given = {name: parameter.detach() for name, parameter in block.named_parameters()}
    places = [(0, 0, 0)] * prefix + list(itertools.product(*map(range, grid)))
    order = [*range(prefix), *reversed(range(prefix, x.shape[1]))]
    forward = one_pass(given, x, given["gate"], places, block.config)
    backward = one_pass(given, forward[:, order], given["gate_reversed"], places, block.config)
    return backward[:, order]


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [4, 5, 24])
def test_a_grid_is_reversed_as_published(chunk):
    block, video = block_of(GridFormat(), chunk=chunk), random(2, *GRID, DIM)
    y, _ = block(video)
    assert (y.flatten(1, 3) - published(block, video.flatten(1, 3), 0)).abs().max() < 1e-11


@pytest.mark.parametrize("prefix", [0, 1, 4, 6])
def test_a_text_before_a_video_stays_in_front_as_published(prefix):
    block, x = block_of(PrefixedGridFormat(prefix, *GRID[1:])), random(2, prefix + TOKENS, DIM)
    y, _ = block(x)
    assert (y - published(block, x, prefix)).abs().max() < 1e-11
    if not prefix:
        assert torch.equal(y, block_of(GridFormat())(x.unflatten(1, GRID))[0].flatten(1, 3))


def test_imported_video_weights_compute_the_published_layer():
    """A layer's own names go in, and what comes out is the definition with those very tensors."""
    weight_map = default_registry().weight_map("ttt_mlp-video_dit")
    theirs = export_weights(block_of(GridFormat(), seed=7, expansion=4), weight_map)
    block = block_of(PrefixedGridFormat(2, *GRID[1:]), expansion=4)
    import_weights(block, weight_map, theirs)
    names = {"W1": "fast_weight.0", "W2": "fast_weight.1", "b1": "fast_bias.0", "b2": "fast_bias.1"}
    names |= {"gating_alpha": "gate", "backward_gating_alpha": "gate_reversed"}
    given = {names.get(name, name.replace("learnable_ttt_", "").replace("ttt_", "")): t for name, t in theirs.items()}
    x = random(1, 2 + TOKENS, DIM)
    places = [(0, 0, 0)] * 2 + list(itertools.product(*map(range, GRID)))
    order = [0, 1, *reversed(range(2, 2 + TOKENS))]
    forward = one_pass(given, x, given["gate"], places, block.config)
    expected = one_pass(given, forward[:, order], given["gate_reversed"], places, block.config)[:, order]
    assert (block(x)[0] - expected).abs().max() < 1e-11


@pytest.mark.parametrize("prefix", [0, 1, 4, 5, 11])
def test_a_prefix_of_a_plain_sequence_is_the_two_passes_over_the_tokens_moved(prefix):
    """By slots alone: the second pass is a block that runs forward, on the first one's result in the other order."""
    both = build(config=TTTLinearConfig(chunk=4, bidirectional=True), dtype=torch.float64)
    alone = build(config=TTTLinearConfig(chunk=4, causal=False), dtype=torch.float64)
    alone.load_state_dict(both.state_dict(), strict=False)
    x = random(2, 11, 16)
    order = [*range(prefix), *reversed(range(prefix, 11))]
    forward = alone(x)[0]
    with torch.no_grad():
        alone.gate.copy_(both.gate_reversed)
    expected = alone(forward[:, order])[0][:, order]
    assert torch.equal(both(x, None, BlockContext(prefix=prefix))[0], expected)


def test_what_each_pass_hears_of_what():
    """With one token a chunk a pass is causal by itself, so which token reaches which says what the order was."""
    prefix, length = 3, 8
    block = build(config=TTTLinearConfig(chunk=1, bidirectional=True), dtype=torch.float64)
    with torch.no_grad():
        block.gate.zero_()  # the forward pass is the identity: only the reversed one is heard
        block.gate_reversed.fill_(0.5)
    x, context = random(1, length, 16), BlockContext(prefix=prefix)
    y = block(x, None, context)[0]
    for changed in range(length):
        other = x.clone()
        other[:, changed] += 1
        moved = (block(other, None, context)[0] != y).any(-1)[0]
        if changed < prefix:  # the text is first, in order, and then all of the video comes
            expected = [token >= changed for token in range(length)]
        else:
            expected = [prefix <= token <= changed for token in range(length)]
        assert moved.tolist() == expected


def test_turning_the_rest_around_turns_its_outputs_around():
    """With the two gates equal to those of the other direction and no forward pass, the order is all that differs."""
    block = build(config=TTTLinearConfig(chunk=4, bidirectional=True), dtype=torch.float64)
    with torch.no_grad():
        block.gate.zero_()
        block.gate_reversed.fill_(0.5)
    forward = build(config=TTTLinearConfig(chunk=4, causal=False), dtype=torch.float64)
    forward.load_state_dict({**block.state_dict(), "gate": block.gate_reversed}, strict=False)
    x = random(2, 10, 16)
    turned_x = torch.cat([x[:, :3], x[:, 3:].flip(1)], dim=1)
    y = block(turned_x, None, BlockContext(prefix=3))[0]
    assert torch.equal(torch.cat([y[:, :3], y[:, 3:].flip(1)], dim=1), forward(x)[0])


def test_gradients_behind_a_prefix():
    block, x = block_of(PrefixedGridFormat(2, 1, 2)), random(1, 8, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x)[0], (x,), fast_mode=True, atol=1e-6, rtol=1e-4)
    assert torch.autograd.gradgradcheck(lambda x: block(x)[0], (x,), fast_mode=True, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("prefix", [-1, 12, 2.0, True, torch.tensor(2), None], ids=str)
def test_a_prefix_that_is_no_number_of_the_tokens_is_refused(prefix):
    block = build(config=TTTLinearConfig(chunk=4, bidirectional=True))
    with pytest.raises(ContextError, match=r"11 tokens and a prefix of .*Give a whole number of tokens from 0 to 11"):
        block(torch.randn(1, 11, 16), None, BlockContext(prefix=prefix))


def test_a_causal_block_refuses_a_prefix():
    block = build()
    with pytest.raises(ContextError, match="is causal and got a prefix of 3 tokens: it has no reversed pass"):
        block(torch.randn(1, 11, 16), None, BlockContext(prefix=3))
    with pytest.raises(ContextError, match="is causal and got a prefix"):
        block.step(torch.randn(1, 1, 16), block.allocate_state(1), BlockContext(prefix=1))


def test_a_format_that_declares_too_long_a_prefix_is_refused():
    class Wrong(SequenceFormat):
        def prefix(self, activations):
            return activations.shape[1] + 1

    block = build(config=TTTLinearConfig(chunk=4, bidirectional=True))
    block.info = replace(block.info, format=Wrong())
    with pytest.raises(ContextError, match="5 tokens and a prefix of 6"):
        block(torch.randn(1, 5, 16))
