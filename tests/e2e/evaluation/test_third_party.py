"""Conditions act on any block: one that ignores the factor of the inner rate, one whose state is more than memory."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt import inject, parse_config
from moshi_ttt.evaluation.models import ModelUnderTest, evaluate_codes
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from tests.unit.plugins.test_convolution_cache import Convolved, Unscaled, registry_of

CHUNK, FRAMES = 4, 24


def model_around(block) -> ModelUnderTest:
    registry = registry_of(block)
    entry = {"variant": "convolved", "layers": "1", "chunk": CHUNK, "gate": {"init": 0.5}}
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}, "ttt": [entry]}, registry=registry
    )
    model = MOSHI_HOST.load(config.host)
    return ModelUnderTest(name="one", model=model, injection=inject(model, config, registry=registry), facts={})


def codes() -> torch.Tensor:
    return torch.randint(0, 100, (2, 17, FRAMES), generator=torch.Generator().manual_seed(0))


@pytest.mark.first_by_default
@pytest.mark.parametrize("segments", [None, 8])
@pytest.mark.parametrize("block", [Unscaled, Convolved])
def test_every_condition_changes_what_a_third_partys_block_does(block, segments):
    tested = model_around(block)
    on, off, reset, other = (
        evaluate_codes(tested, codes(), condition, every=8, segments=segments).audio.nan_to_num()
        for condition in ("updates on", "updates off", "memory reset", "memory of another")
    )
    assert torch.equal(on, evaluate_codes(tested, codes(), "updates on", every=8, segments=segments).audio.nan_to_num())
    for changed in (off, reset, other):
        assert not torch.equal(changed, on)
    assert torch.equal(reset[:, : 8 - 1], on[:, : 8 - 1]), "nothing is reset before"


def test_a_cache_that_is_not_memory_is_neither_reset_nor_exchanged():
    tested = model_around(Convolved)
    site = next(module for module in tested.model.modules() if type(module).__name__ == "BlockSite")
    with torch.no_grad(), tested.model.streaming(2):
        for frame in codes().unbind(-1):
            tested.model.forward_text(frame[..., None])
        state = site._streaming_state
        before = {name: tensor.clone() for name, tensor in state.buffers.items()}
        state.exchange()
        assert torch.equal(state.buffers["last"], before["last"])
        assert torch.equal(state.buffers["weight.0"], before["weight.0"].roll(1, 0))
        state.forget()
        assert torch.equal(state.buffers["last"], before["last"])
        assert torch.equal(state.buffers["weight.0"], site.block.init_state(2)["weight.0"])
