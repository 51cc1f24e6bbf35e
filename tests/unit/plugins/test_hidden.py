"""The hidden activation whose backward pass keeps gate and up: bit for bit the operations one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moshi_ttt.core import gated_mlp
from moshi_ttt.plugins.gating_mlp.hidden import hidden_activation


class Fused(nn.Module):
    def __init__(self, activation, dtype):
        super().__init__()
        self.linear_in = nn.Linear(6, 20, bias=False, dtype=dtype)
        self.linear_out = nn.Linear(10, 6, bias=False, dtype=dtype)
        self.activation = activation


class Split(nn.Module):
    def __init__(self, activation, dtype):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(6, 10, bias=False, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(10, 6, bias=False, dtype=dtype)
        self.act_fn = activation


layouts = pytest.mark.parametrize("layout", [Fused, Split])


def given(layout, activation=F.silu, dtype=torch.float64):
    torch.manual_seed(0)
    return layout(activation, dtype), torch.randn(2, 7, 6, dtype=dtype, requires_grad=True)


def passes(function, mlp, x):
    """The result and the gradients of ``x`` and of the input projections."""
    y = function(mlp, x)
    leaves = [x, *(part.weight for part in gated_mlp.input_projections(mlp))]
    return [y, *torch.autograd.grad(y.float().pow(2).sum(), leaves)]


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [F.silu, nn.SiLU(), F.gelu], ids=["silu", "SiLU", "gelu"])
def test_both_passes_are_bit_equal(layout, dtype, activation):
    mlp, x = given(layout, activation, dtype)
    found, expected = (passes(function, mlp, x) for function in (hidden_activation, gated_mlp.hidden))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(hidden_activation(mlp, x), expected[0])


@layouts
def test_second_derivatives_are_right(layout):
    mlp, x = given(layout)
    weights = [part.weight for part in gated_mlp.input_projections(mlp)]
    assert torch.autograd.gradgradcheck(lambda x, *_: hidden_activation(mlp, x), (x, *weights))


@layouts
def test_gate_and_up_are_kept_and_nothing_else(layout):
    mlp, x = given(layout)
    own = {part.data_ptr() for part in (x, *mlp.parameters())}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = hidden_activation(mlp, x)
    assert held.requires_grad
    assert sum(kept.values()) == 2 * 2 * 7 * 10 * 8


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("learned", ["gate_proj", "up_proj"])
def test_a_gradient_of_one_half_alone(learned, create_graph):
    mlp, x = given(Split)
    weight = getattr(mlp, learned).weight
    for part in gated_mlp.input_projections(mlp):
        part.weight.requires_grad_(part.weight is weight)
    found, expected = (
        torch.autograd.grad(function(mlp, x.detach()).sum(), weight, create_graph=create_graph)[0]
        for function in (hidden_activation, gated_mlp.hidden)
    )
    assert torch.equal(found, expected)


def test_an_activation_in_place_is_left_to_torch():
    mlp, x = given(Split, nn.SiLU(inplace=True))
    found, expected = (passes(function, mlp, x) for function in (hidden_activation, gated_mlp.hidden))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_halves_of_two_dtypes_are_multiplied_as_torch_does():
    mlp, x = given(Split, dtype=torch.float32)
    mlp.gate_proj.register_forward_hook(lambda module, inputs, y: y.bfloat16())
    found, expected = (passes(function, mlp, x) for function in (hidden_activation, gated_mlp.hidden))
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@layouts
def test_a_hook_on_the_activation_runs(layout):
    mlp, x = given(layout, nn.SiLU())
    seen = []
    gated_mlp.activation(mlp).register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    hidden_activation(mlp, x)
    assert seen == [(2, 7, 10)]
