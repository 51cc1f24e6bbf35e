"""``ttt_ridge`` against its definition: every option, in one call, in pieces and streamed; ill-conditioned streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import BlockCase, Shape, error
from moshi_ttt.plugins.ttt_ridge import reference

OPTIONS: list[dict[str, Any]] = [
    {"chunk": 4},
    {"chunk": 5, "heads": 2, "key_width": 6, "value_width": 3, "success_gate": False},
    {"chunk": 3, "heads": 2, "features": "relu2", "key_width": 20, "novelty": True, "conv_kernel": 2},
    {"chunk": 4, "heads": 4, "decay": 0.3, "value": "hidden", "gate": {"alpha": "layer", "init": 0.4}},
    {"chunk": 6, "heads": 2, "variance_gate": True, "decay": 0.1, "novelty": True, "regularization": 2.0},
    {"chunk": 1, "heads": 2, "gate": {"alpha": "fixed", "init": 0.3}, "readout_scale": 1.5},
]


def case_of(dtype: torch.dtype = torch.float64, **options: Any) -> BlockCase:
    registry = default_registry()
    config = parse_block({"variant": "ttt_ridge", **options}, registry=registry)
    return BlockCase(variant="ttt_ridge", config=config, shape=Shape(dim=16, heads=2, batch=2), dtype=dtype)


def weights_of(block: Any) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), "gate": block.gate}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_its_definition(options):
    case = case_of(**options)
    block, x = case.block(), case.inputs(23)
    context = case.context(x)
    source = context.input_embeddings if case.config.value == "embedding" else x
    expected = reference.layer(
        x, source, weights_of(block), heads=block.heads, chunk_size=block.chunk, features=case.config.features,
        keep=block.keep, readout_scale=case.config.readout_scale,
    )  # fmt: skip
    y, _ = block(x, None, context)
    assert error(y, expected) < 1e-10
    state = block.allocate_state(2)
    streamed = torch.cat([case.step(block, x[:, t : t + 1], state) for t in range(23)], dim=1)
    assert error(streamed, expected) < 1e-10
    cotangent = torch.randn_like(y)
    parameters = list(block.parameters())
    ours = torch.autograd.grad((y * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((expected * cotangent).sum(), parameters)
    for (name, _), a, b in zip(block.named_parameters(), ours, theirs, strict=True):
        assert error(a, b) < 1e-9, name
