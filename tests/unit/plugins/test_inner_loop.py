"""The inner loop's fast forms against its definition: odd lengths, any depth, per-row positions, poisoned buffers."""

from __future__ import annotations

from copy import copy
from itertools import pairwise

import pytest
import torch

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import clone
from moshi_ttt.core.testing import error
from moshi_ttt.plugins.hybrid import inner_loop, naive
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, UpdateRule, after_chunk
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop
from moshi_ttt.plugins.hybrid.objective import InnerNorm, PlainLoss
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

DEPTHS = [(4, 4), (4, 12, 4), (6, 9, 5, 6)]


class Problem:
    """Random tokens and weights; everything requires a gradient."""

    def __init__(self, widths, *, batch=2, heads=3, length=11, chunk=4, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        dim = widths[0]
        self.chunk, self.length, self.batch = chunk, length, batch
        self.q, self.k, self.v = (random(batch, heads, length, dim) for _ in range(3))
        self.lr = (0.1 * random(batch, heads, length)).detach().abs().requires_grad_()
        self.scale = random(chunk).detach().abs().requires_grad_()
        self.norm_weight, self.norm_bias = random(heads, dim), random(heads, dim)
        self.weights = tuple((random(heads, a, b) / a**0.5).detach().requires_grad_() for a, b in pairwise(widths))
        self.biases = tuple(random(heads, 1, b) for b in widths[1:])
        self.leaves = [
            self.q, self.k, self.v, self.lr, self.scale, self.norm_weight, self.norm_bias, *self.weights, *self.biases
        ]  # fmt: skip

    def tokens(self, start=0, stop=None):
        return Tokens(*(x[:, :, start:stop].transpose(1, 2) for x in (self.q, self.k, self.v, self.lr)))

    @property
    def norm(self):
        return InnerNorm(self.norm_weight, self.norm_bias, 1e-6)

    def state(self):
        return inner_loop.initial_state(self.weights, self.biases, self.chunk, self.batch)

    def reference(self, causal=True):
        y, weights, biases = naive_inner_loop(
            self.q, self.k, self.v, self.lr, self.scale, self.norm_weight, self.norm_bias, self.weights, self.biases,
            chunk_size=self.chunk, eps=1e-6, causal=causal,
        )  # fmt: skip
        return y.transpose(1, 2).flatten(2), weights, biases

    def run(self, causal=True, state=None, start=0, stop=None):
        tokens = self.tokens(start, stop)
        layout = ChunkLayout(tokens.q.shape[1], self.chunk, offset=None if state is None else state["position"])
        return chunk_inner_loop(tokens, state or self.state(), self.norm, self.scale, layout=layout, causal=causal)

    def stream(self, state=None):
        state = clone(self.state()) if state is None else state
        norm = InnerNorm(self.norm_weight, self.norm_bias, 1e-6)
        steps = [recurrent_inner_loop(self.tokens(t, t + 1), state, norm, self.scale) for t in range(self.length)]
        return torch.cat(steps, dim=1), state


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "noncausal"])
@pytest.mark.parametrize("length", [1, 3, 4, 7, 13])
@pytest.mark.parametrize("widths", DEPTHS, ids=str)
def test_chunked_form_equals_the_definition(widths, length, causal):
    problem = Problem(widths, length=length)
    expected, weights, biases = problem.reference(causal)
    actual, state = problem.run(causal)
    assert error(actual, expected) < 1e-12
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        assert error(state[f"weight.{i}"], weight) < 1e-12
        assert error(state[f"bias.{i}"], bias) < 1e-12
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for leaf, a, b in zip(
        range(len(problem.leaves)),
        torch.autograd.grad((actual * cotangent).sum(), problem.leaves, allow_unused=True),
        torch.autograd.grad((expected * cotangent).sum(), problem.leaves, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros_like(problem.leaves[leaf])
        assert error(zero if a is None else a, zero if b is None else b) < 1e-10, f"gradient {leaf}"


@pytest.mark.parametrize("length", [63, 100])
def test_chunked_form_equals_the_definition_at_odd_lengths(length):
    problem = Problem((4, 8, 4), length=length, chunk=16, batch=1, heads=1)
    with torch.no_grad():
        actual, _ = problem.run()
    assert error(actual, problem.reference()[0]) < 1e-10


@pytest.mark.parametrize("widths", DEPTHS, ids=str)
def test_streaming_equals_the_definition(widths):
    problem = Problem(widths)
    y, state = problem.stream()
    expected, weights, _ = problem.reference()
    assert error(y, expected) < 1e-12
    assert error(state["weight.0"], weights[0]) < 1e-12
    assert state["position"].tolist() == [11 % 4] * 2


def test_rows_may_stand_at_different_positions():
    problem = Problem((4, 8, 4), length=12, batch=2)
    with torch.no_grad():
        whole, final = problem.run()
        # row 0 has seen 2 tokens, row 1 has seen 5
        starts = (2, 5)
        parts = []
        for row, seen in enumerate(starts):
            _, state = problem.run(stop=seen)
            parts.append({name: tensor[row] for name, tensor in state.items()})
        state = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        assert state["position"].tolist() == [2, 1]
        tokens = Tokens(
            *(
                torch.stack([x[row, :, seen : seen + 7] for row, seen in enumerate(starts)]).transpose(1, 2)
                for x in (problem.q, problem.k, problem.v, problem.lr)
            )
        )
        layout = ChunkLayout(7, problem.chunk, offset=state["position"])
        y, after = chunk_inner_loop(tokens, state, problem.norm, problem.scale, layout=layout)
    for row, seen in enumerate(starts):
        assert error(y[row], whole[row, seen : seen + 7]) < 1e-12
    assert error(after["weight.0"][1], final["weight.0"][1]) < 1e-12, "row 1 has seen all 12 tokens"
    assert after["position"].tolist() == [1, 0]


@pytest.mark.parametrize("form", ["run", "step"])
def test_poisoned_slots_ahead_of_the_position_change_nothing(form):
    problem = Problem((4, 8, 4), length=6)
    with torch.no_grad():
        _, state = problem.run(stop=6)
    clean, poisoned = clone(state), clone(state)
    for name, tensor in poisoned.items():
        if name.startswith(("input", "gradient")):
            tensor[:, :, 2:] = float("nan")
    more = Problem((4, 8, 4), length=3, seed=5)
    results = []
    with torch.no_grad():
        for start in (clean, poisoned):
            if form == "run":
                layout = ChunkLayout(3, 4, offset=start["position"])
                y, after = chunk_inner_loop(more.tokens(), start, problem.norm, problem.scale, layout=layout)
            else:
                y = torch.cat(
                    [recurrent_inner_loop(more.tokens(t, t + 1), start, problem.norm, problem.scale) for t in range(3)],
                    dim=1,
                )
                after = start
            results.append((y, after))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in clean)


def test_uninitialized_memory_does_not_reach_a_result(monkeypatch):
    """With every ``torch.empty`` filled with nan the fast path gives the same numbers."""
    problem = Problem((4, 8, 4), length=9)
    expected, _ = problem.run()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        actual, _ = problem.run()
        streamed, _ = problem.stream()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual, expected)
    assert error(streamed, expected) < 1e-12


def test_one_layer_is_exactly_ttt_linear():
    """With one layer the general code is W - scale * sum k (lr * dLN): checked against that formula by hand."""
    problem = Problem((4, 4), length=4, batch=1, heads=1)
    with torch.no_grad():
        _, state = problem.run()
        weight, bias = problem.weights[0][0], problem.biases[0][0]
        z = problem.k[0, 0] @ weight + bias
        mean, std = z.mean(-1, keepdim=True), (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        normal = (z - mean) / std
        error_ = normal * problem.norm_weight[0] + problem.norm_bias[0] - (problem.v - problem.k)[0, 0]
        g = error_ * problem.norm_weight[0]
        g = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) / std
        expected = weight - problem.scale[-1] * problem.k[0, 0].T @ (problem.lr[0, 0, :, None] * g)
    assert error(state["weight.0"][0, 0], expected) < 1e-12


def test_a_thousand_updates_below_a_bfloat16_ulp_survive_in_float32_and_are_lost_in_bfloat16():
    """Why the default policy keeps state in float32. One chunk is one token, each moving one weight by 1/4 ulp of 1."""
    quarter_ulp = 2.0**-7 / 4

    def total(dtype):
        fast = FastNetwork((torch.ones(1, 1, 1, 1, dtype=dtype),), (torch.zeros(1, 1, 1, 1, dtype=dtype),))
        one = torch.ones(1, 1, 1, 1, dtype=dtype)
        memory, everyone = ChunkMemory((one,), (-quarter_ulp * one,)), torch.tensor([True])
        for _ in range(1_000):
            fast = after_chunk(fast, memory, PlainLoss(), torch.ones((), dtype=dtype), everyone, UpdateRule())
        return float(fast.weights[0]) - 1

    assert total(torch.float32) == pytest.approx(1_000 * quarter_ulp, rel=1e-6)
    assert total(torch.bfloat16) == 0.0


def test_updates_off_leaves_the_state_alone():
    problem = Problem((4, 8, 4), length=9)
    tokens = problem.tokens()
    tokens = tokens._replace(lr=torch.zeros_like(tokens.lr))
    with torch.no_grad():
        y, state = chunk_inner_loop(
            tokens, problem.state(), problem.norm, problem.scale, layout=ChunkLayout(9, problem.chunk)
        )
    assert torch.equal(state["weight.0"], problem.state()["weight.0"])
    plain = naive.network(
        problem.q.transpose(1, 2).transpose(1, 2), list(zip(problem.weights, problem.biases, strict=True))
    )
    expected = problem.q + naive.layer_norm(plain, problem.norm_weight, problem.norm_bias, 1e-6)
    assert error(y, expected.transpose(1, 2).flatten(2)) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e80], ids=str)
@pytest.mark.parametrize("widths", DEPTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "noncausal"])
def test_a_token_that_is_not_finite_is_left_out_with_its_chunks_update(widths, causal, bad):
    """The definition: nobody uses the token, and the chunk after starts from the weights that its own started from."""
    problem, row, place = Problem(widths, length=12), 1, 6

    def only(kept, lr):
        part = copy(problem)
        part.q, part.k, part.v, part.lr = (x[:, :, kept].detach() for x in (problem.q, problem.k, problem.v, lr))
        return part.reference(causal)

    lr = problem.lr.detach().clone()
    lr[row, :, place] = 0
    expected, _, _ = only(list(range(8)), lr)
    after, weights, _ = only([0, 1, 2, 3, 8, 9, 10, 11], problem.lr)
    for part in (problem.k, problem.v, problem.q):
        with torch.no_grad():
            part[row, :, place] = bad
    with torch.no_grad():
        y, state = problem.run(causal)
        others = torch.arange(8) != place
        assert error(y[row, :8][others], expected[row][others]) < 1e-12
        assert error(y[row, 8:], after[row, 4:]) < 1e-12
        assert error(state["weight.0"][row], weights[0][row]) < 1e-12
        assert state["skipped"].tolist() == [0, 1]
        assert state["spoiled"].tolist() == [0, 0]
        if causal:
            streamed, final = problem.stream()
            assert error(streamed[row][torch.arange(12) != place], y[row][torch.arange(12) != place]) < 1e-12
            assert final["skipped"].tolist() == [0, 1]
