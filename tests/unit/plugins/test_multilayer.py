"""Fast networks of any depth: one and two layers are TTT-Linear and TTT-MLP; every depth against finite differences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.testing import BlockCase, error
from moshi_ttt.plugins.hybrid import inner_loop
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("shallow", "depth"),
    [(TTTLinearConfig(chunk=4, base_lr=0.5), 1), (TTTMLPConfig(chunk=4, base_lr=0.5, expansion=3), 2)],
    ids=["linear", "mlp"],
)
def test_one_and_two_layers_are_bit_identical_to_ttt_linear_and_ttt_mlp(shallow, depth, causal):
    shallow = shallow.model_copy(update={"causal": causal})
    deep = TTTMultilayerConfig(chunk=4, base_lr=0.5, depth=depth, expansion=3, causal=causal)
    cases = [BlockCase(variant=config.variant, config=config) for config in (shallow, deep)]
    one, other = (case.block() for case in cases)
    other.load_state_dict(one.state_dict())
    x = cases[0].inputs(11)
    (y, state), (z, after) = (block(x, None, BlockContext()) for block in (one, other))
    assert torch.equal(y, z)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    y.sum().backward()
    z.sum().backward()
    gradients = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients)
    if causal:
        states = [block.allocate_state(3) for block in (one, other)]
        for t in range(11):
            y, z = (block.step(x[:, t : t + 1], s) for block, s in zip((one, other), states, strict=True))
            assert torch.equal(y, z)


def draw_network(widths, heads=2, batch=2, length=7, dim=4):
    generator = torch.Generator().manual_seed(len(widths))

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    sizes = (dim, *widths, dim)
    weights = [draw(heads, a, b, scale=0.4) for a, b in pairwise(sizes)]
    biases = [draw(heads, 1, b, scale=0.4) for b in sizes[1:]]
    q, k, v = (draw(batch, length, heads, dim) for _ in range(3))
    lr = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64).requires_grad_()
    norm = 1 + draw(heads, dim, scale=0.1).detach(), draw(heads, dim, scale=0.1)
    return (q, k, v, lr), (norm[0].requires_grad_(), norm[1]), weights, biases


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", [(), (5,), (5, 3), (3, 6, 5)], ids=lambda widths: f"{len(widths) + 1} layers")
def test_every_depth_against_the_definition_and_finite_differences(widths, causal):
    tokens, norm, weights, biases = draw_network(widths)
    size, depth = 3, len(weights)
    scale = torch.linspace(1.0, 0.2, size, dtype=torch.float64) if causal else torch.full((size,), 1 / size).double()

    def function(*leaves):
        state = inner_loop.initial_state(leaves[6 : 6 + depth], leaves[6 + depth :], size, 2)
        y, _ = chunk_inner_loop(
            inner_loop.Tokens(*leaves[:4]), state, InnerNorm(leaves[4], leaves[5], 1e-6), scale,
            layout=ChunkLayout(7, size), causal=causal,
        )  # fmt: skip
        return y

    leaves = (*tokens, *norm, *weights, *biases)
    expected, _, _ = naive_inner_loop(
        *(part.transpose(1, 2) for part in tokens), scale, *norm, weights, biases, chunk_size=size, eps=1e-6,
        causal=causal,
    )  # fmt: skip
    assert error(function(*leaves), expected.transpose(1, 2).flatten(2)) < 1e-10
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dims": [8], "expansion": 2}, "hidden_dims or expansion, not both"),
        ({"hidden_dims": [8, 8], "depth": 5}, "makes 3 layers, and depth says 5; leave depth out"),
        ({"hidden_dims": [8, 0]}, "hidden_dims.1"),
        ({"depth": 0}, "depth"),
        ({"expansion": 0}, "expansion"),
    ],
    ids=str,
)
def test_widths_that_contradict_are_refused(options, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        TTTMultilayerConfig(**options)


def test_hidden_dims_say_the_depth():
    assert TTTMultilayerConfig(hidden_dims=[8, 4]).depth == 3
    assert TTTMultilayerConfig(hidden_dims=[]).depth == 1
