"""The success gate against its definition, call against steps, and where answers or values are zero."""

from __future__ import annotations

import math

import pytest
import torch

from moshi_ttt.core.testing import error
from moshi_ttt.plugins.common.success_gate import GateState, SuccessGate, directions, initial_state, similarity

CPU = torch.device("cpu")


def build(heads=2, taps=4, noise=0.3, dtype=torch.float64):
    gate = SuccessGate(heads, dtype=dtype, taps=taps)
    gate.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return gate


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def defined(gate, answers, values):
    """One number at a time, in float64."""
    out = torch.zeros(*answers.shape[:-1], 1, dtype=torch.float64)
    for b in range(answers.shape[0]):
        for head in range(answers.shape[2]):
            scores = []
            for t in range(answers.shape[1]):
                given = answers[b, t - 1, head].tolist() if t else [0.0] * answers.shape[-1]
                came = values[b, t, head].tolist()
                norms = math.hypot(*given) * math.hypot(*came)
                scores.append(sum(x * y for x, y in zip(given, came, strict=True)) / norms if norms else 0.0)
                total = sum(gate.weights[head, j].item() * scores[t - j] for j in range(gate.taps) if t >= j)
                z = gate.bias[head].item() + gate.slope[head].item() * total
                out[b, t, head, 0] = 1 / (1 + math.exp(-z))
    return out


def stepped(gate, answers, values, state, masks=None):
    out = []
    for t in range(answers.shape[1]):
        out.append(gate.step(answers[:, t], values[:, t], state, None if masks is None else masks[t]))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("taps", [1, 2, 4])
@torch.no_grad()
def test_a_call_is_the_definition(taps):
    gate, answers, values = build(taps=taps), draw(3, 9, 2, 5), draw(3, 9, 2, 5, seed=2)
    answers[1, 3:5], values[2, 4] = 0, 0
    assert error(gate(answers, values)[0], defined(gate, answers, values)) < 1e-14


def test_initial_values():
    gate = build(heads=3, noise=0.0)
    assert gate.bias.tolist() == [-1.0] * 3
    assert gate.slope.tolist() == [4.0] * 3
    assert gate.weights.tolist() == [[0.25] * 4] * 3


@pytest.mark.parametrize("taps", [1, 4])
@torch.no_grad()
def test_every_split_and_every_step_equal_one_call(taps):
    gate, answers, values = build(taps=taps), draw(2, 8, 2, 5), draw(2, 8, 2, 5, seed=2)
    whole, final = gate(answers, values)
    for cut in range(1, 8):
        first, state = gate(answers[:, :cut], values[:, :cut])
        second, after = gate(answers[:, cut:], values[:, cut:], state)
        assert error(torch.cat([first, second], 1), whole) < 1e-14
        assert all(error(a, b) < 1e-14 for a, b in zip(after, final, strict=True))
        state = GateState(*(part.clone() for part in state))
        addresses = [part.data_ptr() for part in state]
        assert error(stepped(gate, answers[:, cut:], values[:, cut:], state), whole[:, cut:]) < 1e-14
        assert all(error(a, b) < 1e-14 for a, b in zip(state, final, strict=True))
        assert [part.data_ptr() for part in state] == addresses
    state = initial_state(2, 2, 5, taps, torch.float64, CPU)
    assert error(stepped(gate, answers, values, state), whole) < 1e-14


@torch.no_grad()
def test_a_masked_row_keeps_its_state_and_the_other_its_bits():
    gate, answers, values = build(), draw(2, 6, 2, 5), draw(2, 6, 2, 5, seed=2)
    both = initial_state(2, 2, 5, 4, torch.float64, CPU)
    expected = stepped(gate, answers, values, both)
    masked = initial_state(2, 2, 5, 4, torch.float64, CPU)
    out = stepped(gate, answers[:, :3], values[:, :3], masked)
    held = [part[1].clone() for part in masked]
    stepped(gate, answers[:, 3:], values[:, 3:], masked, [torch.tensor([True, False])] * 3)
    assert all(torch.equal(part[1], before) for part, before in zip(masked, held, strict=True))
    assert all(torch.equal(part[0], other[0]) for part, other in zip(masked, both, strict=True))
    assert torch.equal(out, expected[:, :3])


@torch.no_grad()
def test_the_answer_of_a_token_and_what_comes_later_change_no_gate_up_to_it():
    gate, answers, values = build(), draw(2, 8, 2, 5), draw(2, 8, 2, 5, seed=2)
    base = gate(answers, values)[0]
    for t in range(8):
        changed, later = answers.clone(), values.clone()
        changed[:, t:] += 1
        later[:, t + 1 :] += 1
        assert torch.equal(gate(changed, later)[0][:, : t + 1], base[:, : t + 1])
    later = values.clone()
    later[:, 3] += 1
    assert not torch.equal(gate(answers, later)[0][:, 3], base[:, 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-18, 1e18, 1e30])
def test_gradients_are_finite_at_zero_and_at_any_size(size, dtype):
    gate = build(dtype=dtype)
    answers = (size * draw(1, 5, 2, 4)).to(dtype).requires_grad_()
    values = (size * draw(1, 5, 2, 4, seed=2)).to(dtype).requires_grad_()
    y, _ = gate(answers, values)
    y.square().sum().backward()
    for tensor in (y, answers.grad, values.grad, *(parameter.grad for parameter in gate.parameters())):
        assert tensor.isfinite().all()
    if size == 0:
        assert not answers.grad.any()
    elif size > 1e-19:
        assert error(y, defined(gate, answers.detach().double(), values.detach().double())) < 1e-5


def test_cosine_is_bounded_right_and_differentiable_twice():
    o, v = draw(7, 5).requires_grad_(), draw(7, 5, seed=2).requires_grad_()
    assert error(similarity(o, v), torch.nn.functional.cosine_similarity(o, v, dim=-1)) < 1e-14
    assert error(similarity(o, 3 * o), torch.ones(7)) < 1e-14
    assert torch.autograd.gradcheck(similarity, (o, v))
    assert torch.autograd.gradgradcheck(similarity, (o, v))


def test_a_vector_that_is_not_finite_has_no_direction():
    x = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [3.0, 4.0]])
    found = directions(x)
    assert found[:2].isnan().any(-1).all()
    assert found[2].tolist() == pytest.approx([0.6, 0.8])
