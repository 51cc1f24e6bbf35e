"""The host that the conformance kit brings: carried memory follows documents."""

from __future__ import annotations

import torch

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import TOY_HOST, ToyModel


def test_a_new_document_of_the_toy_host_starts_anew():
    model = ToyModel(16, 2, num_layers=2, dtype=torch.float64)
    registry = default_registry()
    config = parse_block({"variant": "ttt_linear", "layers": "1", "chunk": 2}, registry=registry)
    make_plan(model, TOY_HOST, [config], policy=FP32_STATE, registry=registry).apply(model)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), TOY_HOST.carry(model, None, document_ids=torch.tensor([1, 2])) as state:
        fresh = model(x)
    with torch.no_grad(), TOY_HOST.carry(model, state, document_ids=torch.tensor([1, 3])):
        one_new = model(x)
    assert not torch.equal(one_new[0], fresh[0])
    torch.testing.assert_close(one_new[1], fresh[1], rtol=0, atol=1e-12)
