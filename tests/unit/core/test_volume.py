"""The volume by itself: what it computes, what it costs, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import ConfigError, ContextError, InjectionError
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.volume import LARGEST_VOLUME, at_volume, combined, volume_switch
from tests.unit.core.toy import ToyBlock, ToyHost, ToyModel, toy_block, toy_registry


class Heard(ToyBlock):
    """The toy with a volume."""

    scales_output = True

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        return self.at_volume(x, y - x, context), after


def draw(dtype=torch.float32, seed=0):
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_the_numbers_of_the_definition(dtype, output):
    base, added = draw(dtype), draw(torch.float32, 1)
    volume = torch.tensor([0.0, 1.0, 0.375])
    y = at_volume(base, added, volume, output)
    assert y.dtype == dtype
    for row, number in enumerate(volume.tolist()):
        expected = (base[row].to(output) + number * added[row].to(output)).to(dtype) if number else base[row]
        assert torch.equal(y[row], expected)
        assert torch.equal(at_volume(base, added, number, output)[row], expected)


@pytest.mark.parametrize("volume", [0, 0.0, -0.0, torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_zero_is_the_base_bit_for_bit_whatever_is_added(volume, bad):
    base = torch.where(draw() < 0, -0.0, draw())  # -0 + 0 is 0
    y = at_volume(base, torch.full_like(base, bad), volume, torch.float32)
    assert torch.equal(y.view(torch.int32), base.view(torch.int32))


def test_a_volume_of_one_keeps_nothing_for_backward():
    def kept(volume):
        saved = []
        added = draw(seed=1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
            at_volume(draw(), added, volume, torch.float32)
        return sum(saved)

    assert kept(1.0) == 0
    assert kept(torch.ones(3)) <= 3 * 2  # factors and a mask of rows, nothing of the tokens' size


def test_number_and_rows_multiply():
    assert combined(0.5, 0.25, torch.float32) == 0.125
    rows = torch.tensor([0.5, 2.0])
    assert combined(rows, 1.0, torch.float32) is rows
    assert torch.equal(combined(rows, 0.25, torch.float64), torch.tensor([0.125, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_a_number_and_a_tensor_of_it_are_one_volume_at_every_output_scale(dtype, given):
    base, added = draw(torch.float64), draw(torch.float64, 1)
    generator = torch.Generator().manual_seed(0)
    numbers = [0.1, 1 / 3, 0.7, 3.0, 10.0, 1e-7, 0.0, 1.0, *(10 * torch.rand(9, generator=generator)).tolist()]
    for scale in (0.1, 1 / 3, 0.9999, 2.5, 1e-3, 1.0):
        for number in numbers:
            tensor = torch.full((3,), number, dtype=given)
            number = float(tensor[0])
            volumes = combined(number, scale, dtype), combined(tensor, scale, dtype)
            assert isinstance(volumes[0], float)
            one, rows = (at_volume(base, added, volume, dtype) for volume in volumes)
            assert torch.equal(one, rows), (number, scale)


WRONG = [
    (-0.5, "got -0.5. Give a number from 0"), (float("nan"), "got nan"), (float("inf"), "got inf"), (10.5, "got 10.5"),
    (True, "got True"), (None, "got None"), ("0.5", "got '0.5'"), (10**400, "Give a num"),
    (torch.tensor([1, 0]), "dtype torch.int64"), (torch.ones(2, 1), r"shape \(2, 1\)"),
    (torch.tensor(0.5), r"shape \(\)"),
    (torch.tensor([0.5, float("nan")]), "row 1: got nan"), (torch.tensor([-1.0, 0.5]), "row 0: got -1.0"),
    (torch.tensor([True]), "dtype torch.bool"), (1j, "got 1j"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), WRONG, ids=lambda each: str(each)[:20])
def test_what_is_no_volume_is_refused(value, message):
    with pytest.raises(ContextError, match=message):
        volume_switch(value, {})


def test_a_volume_is_copied():
    given = torch.tensor([0.5, 1.0])
    kept = volume_switch(given, {})
    given.fill_(0)
    assert kept.tolist() == [0.5, 1.0]
    assert volume_switch(torch.tensor([0.25]).half(), {}).tolist() == [0.25]
    assert [volume_switch(value, {}) for value in (0, 1, 10, LARGEST_VOLUME)] == [0.0, 1.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("volume", "message"),
    [(-1.0, "got -1.0"), (float("nan"), "got nan"), (torch.ones(2), r"got 3 rows and volume of shape \(2,\)"),
     (torch.ones(3, dtype=torch.int64), "torch.int64"), (torch.ones(3, 1), r"shape \(3, 1\)"),
     (torch.ones(3, device="meta"), "tokens on cpu and volume on meta")],
    ids=str,
)  # fmt: skip
def test_a_call_refuses_what_does_not_fit_its_rows(volume, message):
    with pytest.raises(ContextError, match=message):
        toy_block(cls=Heard)(torch.zeros(3, 2, 8), None, BlockContext(volume=volume))


def test_a_block_that_declares_no_volume_is_refused_wherever_one_is_asked_for():
    block, x = toy_block(), torch.zeros(3, 2, 8)
    block(x, None, BlockContext(volume=1))
    for volume in (0.5, 0, torch.ones(3)):
        with pytest.raises(ContextError, match=r"layers\.1\.sequence \(ToyBlock\): the block does not declare"):
            block(x, None, BlockContext(volume=volume))
        with pytest.raises(ContextError, match="scales_output"):
            volume_switch(volume, {block.info.site: block})
    assert volume_switch(1, {block.info.site: block}) == 1.0


def test_output_scale_is_planned_only_where_it_has_an_effect():
    registry, model = toy_registry(heard=Heard), ToyModel()
    deaf = registry.block("toy").config_class(variant="toy", layers="0", output_scale=0.5)
    with pytest.raises(InjectionError, match=r"output_scale: 0\.5 would have no effect on ToyBlock"):
        make_plan(model, ToyHost(), [deaf], policy=FP32_STATE, registry=registry)
    heard = registry.block("heard").config_class(variant="heard", layers="0", output_scale=0.5)
    make_plan(model, ToyHost(), [heard], policy=FP32_STATE, registry=registry)


@pytest.mark.parametrize("scale", [-0.1, 10.5, float("nan"), float("inf"), True, "loud", None])
def test_output_scale_has_limits(scale):
    from moshi_ttt.core.config_parsing import parse_block

    with pytest.raises(ConfigError, match="output_scale"):
        parse_block({"variant": "toy", "output_scale": scale}, registry=toy_registry())


def test_a_host_without_a_volume_says_so():
    from moshi_ttt.core.errors import HostError

    with pytest.raises(HostError, match="The host 'toy' has no volume"):
        ToyHost().volume(ToyModel(), 0.5)
