"""The volume of ``gating_mlp``: at 0 the host's own call decides, whatever memory and W_0's change would add."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.testing.toy_host import ToyMLP
from tests.unit.plugins.gating import DIM, build, draw

OPTIONS = [{}, {"train_w_down": True}, {"train_w_down": True, "clip": 0.5, "decay": 0.1, "output_scale": 0.5}]


def own_call(mlp, x):
    """What a host might compute by its own, compiled, call: not what the operations one by one give."""
    return mlp(x) + 1e-3


def block_of(compiled=False, **options):
    mlp = ToyMLP(DIM, torch.float64, "cpu")
    block = build(mlp=mlp, **options)
    object.__setattr__(block.info, "mlp_output", own_call)
    if compiled:
        block.compile_step()
    return block, mlp


def context(x, **more):
    return BlockContext(input_embeddings=x.flip(-1), **more)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_call_at_0_is_the_hosts_own(options):
    (block, mlp), x = block_of(**options), draw(3, 11, DIM)
    loud, _ = block(x, None, context(x))
    for volume in (0, 0.0, torch.zeros(3)):
        assert torch.equal(block(x, None, context(x, volume=volume))[0], own_call(mlp, x))
    mixed, _ = block(x, None, context(x, volume=torch.tensor([1.0, 0.0, 1.0])))
    assert torch.equal(mixed[1], own_call(mlp, x)[1])
    assert torch.equal(mixed[[0, 2]], loud[[0, 2]])


@pytest.mark.parametrize("compiled", [False, True], ids=["tensor operations", "compiled"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_at_0_is_the_hosts_own_with_any_memory(options, compiled):
    (block, mlp), x = block_of(compiled, **options), draw(3, 9, DIM)
    state = block.allocate_state(3)
    volume = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for t, token in enumerate(x.split(1, 1)):
        if t == 5:  # a memory that is lost: what it adds is not finite
            state["delta"].fill_(torch.nan)
        y = block.step(token, state, context(token, volume=volume))
        assert torch.equal(y[[0, 2]], own_call(mlp, token)[[0, 2]])
        assert bool(y[1].isfinite().all()) == (t < 5)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_what_is_added_is_proportional_to_it(options):
    (block, mlp), x = block_of(**options), draw(2, 11, DIM)
    loud, base = block(x, None, context(x))[0], own_call(mlp, x)
    for volume in (0.25, 2.0):
        y, _ = block(x, None, context(x, volume=volume))
        torch.testing.assert_close(y, base + volume * (loud - base), rtol=0, atol=1e-12)
