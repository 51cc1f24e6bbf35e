"""What a host's parts in core do: the context of a forward pass, state carried between passes, base weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moshi_ttt.core import carry as carrying
from moshi_ttt.core.base_weights import load_base_weights, weight_digest
from moshi_ttt.core.block import Segments, Site, SiteKind
from moshi_ttt.core.carry import Carry, ForwardContext
from moshi_ttt.core.errors import ContextError, HostError
from moshi_ttt.core.host import CarriedState
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.testing import TOY_HOST, ToyModel
from tests.unit.core.toy import DIM, ToyConfig, toy_block, toy_registry

SITE = Site(1, SiteKind.SEQUENCE)


def injected(layers: str = "all") -> ToyModel:
    model = ToyModel(DIM, 2, num_layers=3, dtype=torch.float32)
    plan = make_plan(model, TOY_HOST, [ToyConfig(layers=layers)], policy=FP32_STATE, registry=toy_registry())
    plan.apply(model)
    return model


def inputs(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(0))


def test_masks_are_read_once_for_all_blocks_of_a_pass(monkeypatch):
    model, x, read = injected(), inputs(), []
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, :2] = False

    class Counting(Segments):
        @classmethod
        def read(cls, token_mask, starts):
            read.append(token_mask)
            return Segments.read(token_mask, starts)

    monkeypatch.setattr(carrying, "Segments", Counting)
    with torch.no_grad():
        y = model(x, token_mask=mask)
        assert len(read) == 1
        model(x[:, :1], token_mask=mask[:, :1])
        assert len(read) == 1, "of one token nothing is read"
        alone = model(x[:1, 2:])
    torch.testing.assert_close(y[:1, 2:], alone)


def test_a_state_is_recorded_once_and_only_where_it_is_asked_for():
    first, second = {"memory": torch.zeros(1)}, {"memory": torch.ones(1)}
    context = ForwardContext(final={})
    context.record(SITE, first)
    context.record(SITE, second)
    assert context.final is not None
    assert context.final[SITE]["memory"].item() == 0
    assert context.final[SITE]["memory"] is not first["memory"], "a copy: it may be a view of a parameter"
    unasked = ForwardContext()
    unasked.record(SITE, first)
    assert unasked.final is None


def test_a_carry_goes_on_from_its_last_pass_and_leaves_what_it_was_given_alone():
    model, x = injected(), inputs(length=8)
    with torch.no_grad():
        with TOY_HOST.carry(model) as first:
            whole = model(x)
        with TOY_HOST.carry(model) as state:
            parts = [model(x[:, :3])]
            after_three = {site: dict(block) for site, block in state.blocks.items()}
            parts.append(model(x[:, 3:]))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        given = CarriedState(after_three)
        with TOY_HOST.carry(model, given):
            again = model(x[:, 3:])
    torch.testing.assert_close(again, parts[1])
    for site, block in after_three.items():
        assert all(torch.equal(given.blocks[site][name], tensor) for name, tensor in block.items())
        torch.testing.assert_close(state.blocks[site], first.blocks[site])


def test_rows_whose_document_changed_are_reset_in_the_next_pass_alone():
    block = toy_block()
    blocks = {SITE: block}
    before = CarriedState({SITE: block.allocate_state(2)}, torch.tensor([1, 2]))
    carry = Carry.open(blocks, before, torch.tensor([1, 3]))
    context = carry.begin(inputs())
    assert context.reset is not None
    assert context.reset.tolist() == [False, True]
    context.run(block, inputs())
    carry.advance(context)
    assert carry.begin(inputs()).reset is None
    assert carry.state.document_ids is not None
    assert carry.state.document_ids.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("before", "ids", "message"),
    [
        (CarriedState({Site(0, SiteKind.SEQUENCE): {}}), None, "has the sites"),
        (None, torch.tensor([[1, 2]]), r"must be \[B\]"),
        (CarriedState({SITE: {"memory": torch.zeros(2, 1)}}), torch.tensor([1, 2]), "does not know the ids"),
        (CarriedState({}, torch.tensor([1, 2, 3])), torch.tensor([1, 2]), "Keep the rows"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(before, ids, message):
    with pytest.raises(ContextError, match=message):
        Carry.open({SITE: toy_block()}, before, ids)


def test_a_pass_of_another_number_of_rows_is_refused():
    carry = Carry.open({SITE: toy_block()}, None, torch.tensor([1, 2, 3]))
    with pytest.raises(ContextError, match="has 3 rows and this batch 2"):
        carry.begin(inputs(rows=2))


# ---- base weights


def linear(device: str = "cpu") -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3, device=device), nn.BatchNorm1d(3, device=device))
    model[0].weight.requires_grad_(False)
    return model


def names(model: nn.Module) -> dict[str, str]:
    return {f"base.{key}": key for key in model.state_dict()}


def test_weights_load_by_their_base_names_onto_the_meta_device_too():
    source = linear()
    given = {f"base.{key}": tensor.clone() for key, tensor in source.state_dict().items()}
    for device in ("cpu", "meta"):
        model = linear(device)
        load_base_weights(model, names(model), given)
        assert {key: tensor.device.type for key, tensor in model.state_dict().items()} == dict.fromkeys(
            source.state_dict(), "cpu"
        )
        for key, tensor in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), (device, key)
        assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("base.0.bias"), r"missing base\.0\.bias"),
        (lambda given: given.update(other=torch.zeros(1)), "unexpected other"),
        (
            lambda given: given.update({"base.0.bias": torch.zeros(4)}),
            r"base\.0\.bias has shape \(4,\), the model \(3,\)",
        ),
        (
            lambda given: given.update({"base.0.bias": torch.zeros(3, dtype=torch.int8)}),
            r"base\.0\.bias is torch\.int8",
        ),
    ],
)
def test_other_weights_are_refused_and_nothing_is_written(change, message):
    model = linear()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = {f"base.{key}": tensor + 1 for key, tensor in before.items()}
    change(given)
    with pytest.raises(HostError, match=rf"{message}.*Nothing was loaded"):
        load_base_weights(model, names(model), given)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_digest_is_of_names_shapes_and_values_and_not_of_the_dtype_they_are_held_in():
    weights = {"a": torch.randn(40, 3).bfloat16(), "b": torch.randn(5).bfloat16()}
    digest = weight_digest(weights)
    assert digest == weight_digest({name: weights[name].float() for name in ("b", "a")})
    assert digest == weight_digest(
        {name: t.float() + 1e-9 for name, t in weights.items()}, dict.fromkeys(weights, torch.bfloat16)
    )
    assert digest != weight_digest({"a": weights["a"], "c": weights["b"]})
    assert digest != weight_digest({"a": weights["a"].flatten(), "b": weights["b"]})
    changed = weights["b"].clone()
    changed[-1] += 1
    assert digest != weight_digest({"a": weights["a"], "b": changed})
    assert weight_digest({"a": weights["a"].to("meta")}) is None
