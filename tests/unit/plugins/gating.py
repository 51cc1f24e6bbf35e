"""A small ``gating_mlp`` block in a toy MLP, for the tests of both its regimes."""

from __future__ import annotations

import torch
from torch import nn

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.testing.toy_host import ToyMLP
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig

DIM = 6


def build(*, mlp: nn.Module | None = None, dtype=torch.float64, excite=True, compiled=False, **options) -> GatingMLP:
    mlp = mlp or ToyMLP(DIM, dtype, "cpu")
    info = SiteInfo(
        site=Site(0, SiteKind.FEED_FORWARD), dim=DIM, num_heads=1, device=torch.device("cpu"), dtype=dtype,
        format=SequenceFormat(), mlp=mlp,
    )  # fmt: skip
    block = GatingMLP(GatingMLPConfig(**{"chunk": 4, **options}), info, FP32_STATE.roles(dtype))
    generator = torch.Generator().manual_seed(0)
    block.reset_parameters(generator)
    if excite:
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if compiled:
        block.compile_step()
    return block


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(block, x, target, state=None):
    """Outputs ``[B, T, D]`` of ``x [B, T, D]`` token by token, and the state, from ``state`` or a new one."""
    state = block.allocate_state(x.shape[0]) if state is None else state
    outputs = [
        block.step(token, state, BlockContext(input_embeddings=given))
        for token, given in zip(x.split(1, 1), target.split(1, 1), strict=True)
    ]
    return torch.cat(outputs, dim=1), state


@torch.no_grad()
def assert_is_the_host(block, mlp, x):
    """Check that a call and a stream of ``x [B, T, D]`` are bit-equal to the MLP's; the state after the stream."""
    y, _ = block(x, None, BlockContext(input_embeddings=x.flip(-1)))
    assert torch.equal(y, mlp(x))
    state = block.allocate_state(x.shape[0])
    for t in range(x.shape[1]):
        token = BlockContext(input_embeddings=x.flip(-1)[:, t : t + 1])
        assert torch.equal(block.step(x[:, t : t + 1], state, token), mlp(x[:, t : t + 1]))
    return state
