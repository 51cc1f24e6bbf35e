"""The published 7B shapes with real storage on the CPU: ``make test-full-size`` (about 20 GiB, some minutes)."""

from __future__ import annotations

import pytest
import torch
from moshi.models import LMGen

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.streaming import stream_state

pytestmark = pytest.mark.full_size


def test_7b_injected_on_meta_materialised_and_streamed():
    registry = default_registry()
    entries = [{"variant": "ttt_mlp", "layers": "29,30"}, {"variant": "ttt_linear", "layers": "31"}]
    config = parse_config({"host": {"name": "moshi", "hf_repo": "builtin:moshi-7b"}, "ttt": entries}, registry=registry)
    model = MOSHI_HOST.skeleton(config.host)
    injection = inject(model, config)
    model.to_empty(device="cpu")
    own = {id(parameter) for parameter in injection.parameters()}
    tile = 0.02 * torch.randn(1 << 20, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # random weights, made cheaply: only shapes and dtypes matter here
            if id(parameter) not in own:
                flat = parameter.view(-1)
                for piece in flat.split(tile.numel()):
                    piece.copy_(tile[: piece.numel()])
    injection.initialize()
    injection.check_precision("materialised")
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    generator = LMGen(model.eval(), use_sampling=False)
    with generator.streaming(1):
        for _ in range(3):
            generator.step(torch.zeros(1, 8, 1, dtype=torch.long))
        state = {name: tensor for name, tensor in stream_state(generator).items() if ".ttt/" in name}
    per_stream = sum(t.numel() * t.element_size() for name, t in state.items() if "buffers" in name)
    assert per_stream == injection.plan.state_bytes
    for name, tensor in state.items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
            assert torch.isfinite(tensor).all(), name
    assert {int(tensor[0]) for name, tensor in state.items() if name.endswith("position")} == {3}
