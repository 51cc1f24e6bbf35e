"""``gating_mlp`` on a split gated MLP is what it is on the fused one with the same weights, and names what it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.gated_mlp import hidden, hidden_width, input_projections, output, output_projection
from moshi_ttt.core.testing import BlockCase, default_cases
from moshi_ttt.core.testing.case import assert_close, assert_states_close
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.gating_mlp.block import GatingMLP

OPTIONS: list[dict[str, Any]] = [
    {"chunk": 4, "lr": 0.1},
    {"chunk": 3, "conv_kernel": 4, "target": "hidden_states", "learned_lr": True, "clip": 0.5, "train_w_down": True},
    {"chunk": 4, "update": "ridge", "learned_lr": True, "keys": "unit", "start": "next_frame", "success_gate": True},
]


class SplitMLP(nn.Module):
    """The weights of a ``ToyMLP`` in three modules, named as in Llama."""

    def __init__(self, fused: ToyMLP) -> None:
        super().__init__()
        gate, up = fused.linear_in.weight.detach().chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(weight) for weight in (gate, up, fused.linear_out.weight.detach())
        )
        self.act_fn = fused.activation


def linear(weight: Tensor) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone())
    return made


def pair(case: BlockCase) -> tuple[SequenceBlock, SequenceBlock]:
    """The block on its fused MLP, and one with the same parameters on the split MLP."""
    fused = case.block()
    info = replace(fused.info, mlp=SplitMLP(fused.info.mlp))
    split = GatingMLP(case.config, info, fused.roles)
    split.load_state_dict(fused.state_dict())
    return fused, split


@pytest.mark.parametrize("case", default_cases("gating_mlp", OPTIONS), ids=str)
def test_split_and_fused_compute_the_same(case: BlockCase) -> None:
    fused, split = pair(case)
    x = case.inputs(3 * case.chunk + 1)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, :2] = False
    for more in ({}, {"token_mask": mask}):
        expected, state = case.call(fused, x, **more)
        y, after = case.call(split, x, **more)
        assert_close(y, expected, case.tolerance, "outputs")
        assert_states_close(after, state, case.tolerance, "state")
    expected.float().square().sum().backward()
    y.float().square().sum().backward()
    for name, parameter in split.named_parameters():
        there = fused.get_parameter(name).grad
        assert parameter.grad is not None, name
        assert there is not None, name
        assert_close(parameter.grad, there, case.tolerance * float(there.abs().max().clamp(min=1)), name)
    buffers, others = fused.allocate_state(len(x)), split.allocate_state(len(x))
    for token in x.split(1, dim=1):
        assert_close(case.step(split, token, others), case.step(fused, token, buffers), case.tolerance, "a step")
    assert_states_close(others, buffers, case.tolerance, "streamed state")
    torch.testing.assert_close(split.drift(others), fused.drift(buffers), rtol=1e-2, atol=0)
    assert split.flops_per_token() == fused.flops_per_token()


def test_a_gradient_to_either_half_of_the_input_projection_is_refused_in_a_stream() -> None:
    (case, *_) = default_cases("gating_mlp", OPTIONS[:1])
    _, split = pair(case)
    assert isinstance(split.info.mlp, SplitMLP)
    split.requires_grad_(False)
    split.info.mlp.requires_grad_(False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        part = split.info.mlp.get_submodule(name).requires_grad_(True)
        assert case.step(split, case.inputs(1), split.allocate_state(case.shape.batch)).requires_grad, name
        part.requires_grad_(False)


def test_both_layouts_are_read_alike() -> None:
    fused = ToyMLP(8, torch.float64, "cpu")
    split = SplitMLP(fused)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(hidden(split, x), hidden(fused, x))
    torch.testing.assert_close(output(split, x), output(fused, x))
    assert torch.equal(output(fused, x), fused(x)), "bit for bit the host's own call"
    assert hidden_width(split) == hidden_width(fused) == 16
    assert input_projections(fused) == (fused.linear_in,)
    assert input_projections(split) == (split.gate_proj, split.up_proj)
    assert output_projection(split) is split.down_proj


@pytest.mark.parametrize(
    ("mlp", "given"),
    [
        (None, "gives None"),
        (nn.Linear(4, 4), "a Linear with none of these"),
        (nn.Sequential(), "a Sequential with none"),
    ],
)
def test_another_feed_forward_is_refused_by_the_name_of_the_protocol(mlp: nn.Module | None, given: str) -> None:
    (case, *_) = default_cases("gating_mlp", OPTIONS[:1])
    block = case.block()
    with pytest.raises(ConfigError, match=f"the host's GatedMLP.*{given}.*linear_in.*gate_proj"):
        GatingMLP(case.config, replace(block.info, mlp=mlp), block.roles)


def test_a_part_of_a_gated_mlp_is_named() -> None:
    (case, *_) = default_cases("gating_mlp", OPTIONS[:1])
    block = case.block()
    assert block.info.mlp is not None
    half = SplitMLP(block.info.mlp)
    del half.act_fn
    with pytest.raises(ConfigError, match="a SplitMLP with gate_proj, up_proj, down_proj"):
        GatingMLP(case.config, replace(block.info, mlp=half), block.roles)


def test_a_projection_without_a_width_is_refused() -> None:
    (case, *_) = default_cases("gating_mlp", OPTIONS[:1])
    block = case.block()
    half = SplitMLP(block.info.mlp)
    half.gate_proj = nn.Identity()
    with pytest.raises(ConfigError, match="Identity, has no out_features"):
        GatingMLP(case.config, replace(block.info, mlp=half), block.roles)
