"""A Moshi with blocks, copied, pickled, saved whole and spawned, after it has streamed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.registry import default_registry
from moshi_ttt.core.testing import error
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

pytestmark = pytest.mark.each_kind

BLOCKS = ({"variant": "ttt_mlp", "layers": "0", "chunk": 4}, {"variant": "gating_mlp", "layers": "1", "chunk": 4})


def codes(length: int) -> torch.Tensor:
    return torch.randint(0, 16, (2, 17, length), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(codes(10)).logits.nan_to_num()


def stream(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), model.streaming(2), warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.cat([model.forward_text(codes(10)[..., t : t + 1])[1] for t in range(10)], dim=2)


@pytest.fixture
def model() -> nn.Module:
    model = random_tiny_lm(num_layers=2)
    registry = default_registry()
    plan = make_plan(
        model, MOSHI_HOST, [parse_block(each, registry=registry) for each in BLOCKS], policy=FP32_STATE,
        registry=registry,
    )  # fmt: skip
    blocks = plan.apply(model).blocks
    for block in blocks.values():
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    stream(model)
    next(reversed(blocks.values())).compile_step()
    stream(model)
    return model


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_calls_and_streams_bit_for_bit(model, made):
    other = made(model)
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(stream(other), stream(model))


@pytest.mark.exhaustive  # copies of the same model are compared above
def test_a_model_is_handed_to_a_spawned_process(model):
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool, torch.no_grad():
        found = pool.apply(nn.Module.__call__, (model.eval().requires_grad_(False), codes(10))).logits
    assert error(found.nan_to_num(), logits(model)) < 1e-5
