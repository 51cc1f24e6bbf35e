"""Adapters and states that an earlier version wrote load and compute what they did.

``earlier/`` was written by the version of commit f85dda2, in the kit's toy host of width 8 with one layer: for each
variant an adapter, and in ``call.safetensors`` the input ``x [2, 11, 8]``, the output ``y`` and the block's state after
5 tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models import LMGen
from safetensors.torch import load_file
from torch import nn

from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.core.errors import AdapterError, HostError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.testing.toy_host import ToyHost, ToyModel, toy_registry
from moshi_ttt.hosts.moshi.streaming import restore_stream_state, stream_state

from .conftest import tiny_with

EARLIER = Path(__file__).parent / "earlier"
VARIANTS = sorted(folder.name for folder in EARLIER.iterdir())
SPLIT = 5


class EarlierToyHost(ToyHost):
    """The toy host, with the fingerprint that it had."""

    def earlier_fingerprints(self, model: nn.Module) -> list[dict[str, Any]]:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.base_state_dict(model).items()):
            digest.update(name.encode() + tensor.flatten()[:16].float().numpy().tobytes())
        return [{**self.fingerprint(model), "weights": digest.hexdigest()}]


def toy_model(scale: float = 1.0) -> ToyModel:
    model = ToyModel(8, 1, num_layers=1, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # exact in any arithmetic
            parameter.copy_(((torch.arange(parameter.numel()) * 5 % 11 - 5) / 8 * scale).view(parameter.shape))
    return model


@pytest.fixture
def registry() -> Registry:
    registry = default_registry().copy()
    registry.register("host", "toy", EarlierToyHost())
    return registry


@pytest.fixture(params=VARIANTS)
def saved(request, registry) -> tuple[Injection, dict[str, torch.Tensor]]:
    """The blocks of an earlier adapter, and what they computed."""
    folder = EARLIER / request.param
    return load_adapter(toy_model(), folder, registry=registry), load_file(folder / "call.safetensors")


def test_there_is_an_adapter_of_each_variant():
    shipped = [e.name for e in default_registry().entries() if e.kind == "block"]
    assert sorted(shipped) == VARIANTS


def test_an_earlier_adapter_computes_what_it_did(saved):
    ttt, call = saved
    with torch.no_grad():
        assert (ttt.model(call["x"]) - call["y"]).abs().max() < 1e-5


def test_an_earlier_state_goes_on(saved):
    ttt, call = saved
    ((site, block),) = ttt.blocks.items()
    earlier = {name.removeprefix("state."): tensor for name, tensor in call.items() if name.startswith("state.")}
    kept = dict(earlier)
    state = block.upgrade_state(earlier)
    assert earlier.keys() == kept.keys()
    start = block.init_state(2)
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in start.items()
    }
    with torch.no_grad(), ttt.host.carry(ttt.model, CarriedState({site: state})):
        y = ttt.model(call["x"][:, SPLIT:])
    assert (y - call["y"][:, SPLIT:]).abs().max() < 1e-5


def test_another_base_model_is_still_refused(registry):
    with pytest.raises(AdapterError, match="made for another base model"):
        load_adapter(toy_model(scale=0.5), EARLIER / "ttt_mlp", registry=registry)
    with pytest.raises(AdapterError, match="made for another base model"):  # the toy host itself has no earlier ones
        load_adapter(toy_model(), EARLIER / "ttt_mlp", registry=toy_registry(default_registry()))


def test_an_earlier_stream_goes_on(tmp_path):
    """A stream of in-place TTT from before the state counted tokens with updates enabled (``enabled``)."""
    model, _ = tiny_with({"variant": "gating_mlp", "layers": "1,3", "chunk": 4})
    codes = torch.randint(0, model.card, (2, model.num_codebooks - 1 - model.dep_q, 12))
    generator = LMGen(model, use_sampling=False)
    with torch.no_grad(), generator.streaming(2):
        for frame in codes[..., :6].unbind(-1):
            generator.step(frame[..., None])
        saved = stream_state(generator)
        expected = [generator.step(frame[..., None]) for frame in codes[..., 6:].unbind(-1)]
    earlier = {name: tensor for name, tensor in saved.items() if not name.endswith(".enabled")}
    assert len(saved) - len(earlier) == 2
    with torch.no_grad(), generator.streaming(2):
        restore_stream_state(generator, earlier)
        assert stream_state(generator).keys() == saved.keys()
        found = [generator.step(frame[..., None]) for frame in codes[..., 6:].unbind(-1)]
        without = {name: tensor for name, tensor in earlier.items() if not name.endswith(".position")}
        with pytest.raises(HostError, match=r"missing .*buffers\.enabled; missing .*buffers\.position"):
            restore_stream_state(generator, without)
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
