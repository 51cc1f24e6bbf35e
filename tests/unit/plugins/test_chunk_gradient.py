"""The backward pass that is written out, against torch's of the same function: every gradient, wherever a call ends."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.testing import error
from moshi_ttt.plugins.hybrid import chunk, chunk_passes
from moshi_ttt.plugins.hybrid.chunk_gradient import is_written_out
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.objective import InnerNorm, PlainLoss
from tests.unit.plugins.inner_calls import by_torch, results

DEPTHS = [(4, 4), (4, 16, 4), (4, 8, 12, 4)]


@pytest.mark.parametrize("together", [None, 2])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("length", [3, 13, 16])
@pytest.mark.parametrize("widths", DEPTHS)
def test_every_gradient_is_that_of_torch(widths, length, begun, together, monkeypatch):
    values, gradients = results(widths, length, begun=begun, together=together)
    expected, expected_gradients = by_torch(monkeypatch, widths, length, begun=begun)
    assert max(error(a, b) for a, b in zip(values, expected, strict=True)) < 1e-12
    assert max(error(a, b) for a, b in zip(gradients, expected_gradients, strict=True)) < 1e-11


@pytest.mark.parametrize("widths", DEPTHS)
def test_without_the_causal_mask_too(widths, monkeypatch):
    values, gradients = results(widths, 13, causal=False)
    expected, expected_gradients = by_torch(monkeypatch, widths, 13, causal=False)
    pairs = zip(values + gradients, expected + expected_gradients, strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-11


def test_the_second_derivative_of_gelu():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(chunk_passes.gelu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert error(chunk_passes.gelu_second(x.detach()), second) < 1e-13


def test_which_options_are_written_out():
    norm = InnerNorm(torch.ones(1, 4), torch.zeros(1, 4), 1e-6)
    assert is_written_out(norm, UpdateRule(), torch.float32)
    assert is_written_out(norm, UpdateRule(), torch.float64)
    assert not is_written_out(norm, UpdateRule(), torch.bfloat16)
    assert not is_written_out(norm, UpdateRule(steps=2), torch.float32)
    assert not is_written_out(norm, UpdateRule(momentum=torch.full((1, 1, 1), 0.5)), torch.float32)
    assert not is_written_out(PlainLoss(), UpdateRule(), torch.float32)
    assert not is_written_out(InnerNorm(norm.weight, norm.bias, 1e-6, exact=True), UpdateRule(), torch.float32)


def test_a_call_without_gradients_computes_the_same_bits():
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        tokens = Tokens(*(torch.randn(2, 11, 2, 4, generator=generator) for _ in range(3)), torch.rand(2, 11, 2))
        state = initial_state((torch.randn(2, 4, 4),), (torch.zeros(2, 1, 4),), 4, 2)
        norm, scale = InnerNorm(torch.ones(2, 4), torch.zeros(2, 4), 1e-6), torch.rand(4)

    def call():
        return chunk.chunk_inner_loop(tokens, state, norm, scale, layout=ChunkLayout(11, 4))

    with torch.no_grad():
        y, after = call()
    tokens.q.requires_grad_()
    again, after_again = call()
    assert again.requires_grad
    assert not y.requires_grad
    assert torch.equal(y, again)
    assert all(torch.equal(after[name], after_again[name]) for name in after)
