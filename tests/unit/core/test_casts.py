"""Casts that a stream keeps: every change of a parameter takes effect at the next step, or is refused."""

from __future__ import annotations

import copy
import mmap
import pickle
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW

from moshi_ttt.core import casts as casts_module
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.sharding import assign

BFLOAT = torch.bfloat16


@pytest.fixture(autouse=True)
def _as_in_a_step():
    with torch.no_grad():
        yield


def module() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 8)


def optimise(optimizer, **options):
    def step(owner):
        owner.weight.grad = torch.ones_like(owner.weight)
        optimizer([owner.weight], lr=0.5, **options).step()

    return step


def in_inference_mode(owner):
    with torch.inference_mode():
        owner.weight.add_(1)


def replace(owner):
    owner.weight = nn.Parameter(owner.weight.detach() + 1)


def swap(owner):
    torch.utils.swap_tensors(owner.weight, nn.Parameter(torch.zeros(8, 12)))


CHANGES = {
    "in place": lambda owner: owner.weight.add_(1),
    "one number of .data": lambda owner: owner.weight.data.view(-1)[5:6].fill_(3),
    ".data.copy_": lambda owner: owner.weight.data.copy_(torch.zeros(8, 12)),
    ".data assigned": lambda owner: setattr(owner.weight, "data", torch.zeros(8, 12)),
    ".data of other strides": lambda owner: setattr(owner.weight, "data", torch.ones(12, 8).cumsum(0).t()),
    "the same memory, flipped": lambda owner: setattr(
        owner.weight, "data", owner.weight.data.as_strided((8, 12), (1, 8))
    ),
    "the same memory, from another place": lambda owner: setattr(
        owner.weight, "data", torch.randn(200)[:97].as_strided((8, 12), (12, 1), 1)
    ),
    "assign": lambda owner: assign(owner.weight, torch.zeros(8, 12)),
    "load_state_dict": lambda owner: owner.load_state_dict({"weight": torch.ones(8, 12), "bias": torch.ones(8)}),
    "load_state_dict that assigns": lambda owner: owner.load_state_dict(
        {"weight": torch.ones(8, 12), "bias": torch.ones(8)}, assign=True
    ),
    "an out argument": lambda owner: torch.mm(torch.ones(8, 3), torch.ones(3, 12), out=owner.weight.data),
    "the storage": lambda owner: owner.weight.untyped_storage().fill_(0),
    "an array of numpy's": lambda owner: owner.weight.detach().numpy().fill(2),
    "dlpack": lambda owner: torch.from_dlpack(owner.weight.detach()).fill_(2),
    "set_": lambda owner: owner.weight.set_(torch.zeros(8, 12)),
    "swap_tensors": swap,
    "replaced": replace,
    "inference mode": in_inference_mode,
    "SGD": optimise(SGD),
    "AdamW": optimise(AdamW, foreach=False),
    "AdamW, for each": optimise(AdamW, foreach=True),
    "AdamW, fused": optimise(AdamW, fused=True),
    "initialized": lambda owner: nn.init.zeros_(owner.weight),
    "cast and back": lambda owner: owner.to(BFLOAT).to(torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_a_parameter_is_seen(change):
    owner = module()
    casts = ParameterCasts(owner)
    before = casts.get(owner.weight, BFLOAT).clone()
    for _ in range(2):  # a second time: the copy was made anew meanwhile
        with torch.no_grad():
            owner.weight.mul_(1.5)
        casts.get(owner.weight, BFLOAT)
        change(owner)
        assert torch.equal(casts.get(owner.weight, BFLOAT), owner.weight.to(BFLOAT))
    assert not torch.equal(casts.get(owner.weight, BFLOAT), before)


def test_a_parameter_that_does_not_change_is_cast_once():
    owner = module()
    casts = ParameterCasts(owner)
    first = casts.get(owner.weight, BFLOAT)
    assert torch.equal(first, owner.weight.to(BFLOAT))
    for read in (
        lambda: owner(torch.ones(2, 12)), lambda: owner.weight @ owner.weight.mT, lambda: copy.deepcopy(owner),
        lambda: owner.state_dict(),
    ):  # fmt: skip
        read()
        assert casts.get(owner.weight, BFLOAT) is first
    assert casts.bytes == 8 * 12 * 2
    assert casts.get(owner.weight, torch.float32) is owner.weight, "nothing to cast"
    assert casts.bytes == 8 * 12 * 2


def test_a_copy_is_refreshed_in_place():
    owner = module()
    casts = ParameterCasts(owner)
    first = casts.get(owner.weight, BFLOAT)
    owner.weight.data.add_(1)
    assert casts.get(owner.weight, BFLOAT) is first


def test_writing_to_a_parameter_after_the_stream_keeps_its_memory():
    owner = module()
    address = owner.weight.data_ptr()
    casts = ParameterCasts(owner)
    casts.get(owner.weight, BFLOAT)
    casts.clear()
    with torch.no_grad():
        owner.weight.add_(1)
    assert owner.weight.data_ptr() == address


def test_training_beside_a_stream_computes_the_same():
    results = []
    for watched in (False, True):
        owner = module()
        casts = ParameterCasts(owner)
        optimizer = AdamW(owner.parameters(), lr=0.1)
        for _ in range(3):
            if watched:
                casts.get(owner.weight, BFLOAT)
            with torch.enable_grad():
                owner(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(owner.weight.detach().clone())
    assert torch.equal(*results)


def aliased_by_numpy(owner):
    return owner.weight.detach().numpy()


def aliased_by_a_flat_buffer(owner):
    flat = torch.zeros(8 * 12)
    owner.weight.data = flat.view(8, 12)
    return flat


def from_a_file(owner):
    memory = mmap.mmap(-1, 8 * 12 * 4)
    array = numpy.frombuffer(memory, dtype=numpy.float32).reshape(8, 12)
    owner.weight.data = torch.from_numpy(array)
    return array


def of_other_processes_too(owner):
    owner.weight.share_memory_()
    return owner.weight.data


@pytest.mark.parametrize(
    "alias", [aliased_by_numpy, aliased_by_a_flat_buffer, from_a_file, of_other_processes_too], ids=lambda f: f.__name__
)
def test_memory_that_others_may_write_to_is_cast_at_every_step(alias):
    owner = module()
    other, casts = alias(owner), ParameterCasts(owner)
    for value in (1.0, 2.0):
        casts.get(owner.weight, BFLOAT)
        other[...] = value
        assert torch.equal(casts.get(owner.weight, BFLOAT), owner.weight.to(BFLOAT))
        assert float(owner.weight.detach()[0, 0]) == value, "the parameter still shares that memory"


def test_an_alias_from_the_middle_of_a_stream_is_followed():
    owner = module()
    casts = ParameterCasts(owner)
    casts.get(owner.weight, BFLOAT)
    array = owner.weight.detach().numpy()
    for value in (1.0, 2.0, 3.0):
        array[...] = value
        assert torch.equal(casts.get(owner.weight, BFLOAT), torch.full((8, 12), value, dtype=BFLOAT))


def test_functional_call_is_followed_and_nothing_piles_up():
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module()
            self.casts = ParameterCasts(self)

        def forward(self) -> torch.Tensor:
            return self.casts.get(self.inner.weight, BFLOAT)

    asking, references = Asking(), []
    for value in range(4):
        given = nn.Parameter(torch.full((8, 12), float(value)))
        out = torch.func.functional_call(asking, {"inner.weight": given})
        assert torch.equal(out, given.to(BFLOAT))
        references.append(weakref.ref(given))
        assert torch.equal(asking(), asking.inner.weight.to(BFLOAT))
    del given
    assert len(asking.casts._copies) == 1
    assert not any(reference() is not None for reference in references)


def test_a_foreign_tensor_is_cast_and_not_kept():
    casts = ParameterCasts(module())
    assert casts.get(torch.ones(3), BFLOAT).dtype == BFLOAT
    assert casts.bytes == 0


def test_nothing_is_kept_of_another_mode():
    owner = module()
    casts = ParameterCasts(owner)
    with FakeTensorMode(allow_non_fake_inputs=True):
        casts.get(owner.weight, BFLOAT)
    assert casts.bytes == 0
    kept = casts.get(owner.weight, BFLOAT)
    with torch.no_grad():
        owner.weight.mul_(2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        casts.get(owner.weight, BFLOAT)
    assert torch.equal(casts.get(owner.weight, BFLOAT), owner.weight.to(BFLOAT))
    assert type(kept) is torch.Tensor


def test_a_copy_from_inference_mode_can_be_refreshed_outside_it():
    owner = module()
    casts = ParameterCasts(owner)
    with torch.inference_mode():
        casts.get(owner.weight, BFLOAT)
    with torch.no_grad():
        owner.weight.mul_(2)
    assert torch.equal(casts.get(owner.weight, BFLOAT), owner.weight.to(BFLOAT))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        owner = module()
    casts = ParameterCasts(owner)
    for value in (1.0, 2.0):
        casts.get(owner.weight, BFLOAT)
        with torch.inference_mode():
            owner.weight.fill_(value)
        assert torch.equal(casts.get(owner.weight, BFLOAT), torch.full((8, 12), value, dtype=BFLOAT))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_copies_are_not_copied(how):
    owner = module()
    casts = ParameterCasts(owner)
    casts.get(owner.weight, BFLOAT)
    other = how(casts)
    assert other.bytes == 0
    with torch.no_grad():
        other.block.weight.zero_()
    assert not other.get(other.block.weight, BFLOAT).any()
    assert casts.get(owner.weight, BFLOAT).any()


def test_a_copy_lives_as_long_as_its_stream():
    owner = module()
    casts = ParameterCasts(owner)
    kept = weakref.ref(casts.get(owner.weight, BFLOAT))
    del casts
    assert kept() is None
    assert set(owner.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("streaming", [False, True])
def test_where_gradients_are_recorded_a_cast_has_its_gradient(streaming):
    owner = module()
    context = BlockContext(casts=ParameterCasts(owner) if streaming else None)
    context.cast(owner.weight, BFLOAT)
    with torch.enable_grad():
        context.cast(owner.weight, BFLOAT).sum().backward()
    assert torch.equal(owner.weight.grad, torch.ones(8, 12))


def test_a_torch_that_cannot_say_what_was_written_casts_at_every_step(monkeypatch):
    monkeypatch.setattr(casts_module, "_CAN_WATCH", False)
    owner = module()
    casts = ParameterCasts(owner)
    casts.get(owner.weight, BFLOAT)
    owner.weight.data.add_(1)
    assert torch.equal(casts.get(owner.weight, BFLOAT), owner.weight.to(BFLOAT))
    assert casts.bytes == 0


def test_a_compiled_step_casts():
    owner = module()
    casts = ParameterCasts(owner)
    compiled = torch.compile(lambda: casts.get(owner.weight, BFLOAT) + 1, backend="eager", fullgraph=True)
    for _ in range(2):
        owner.weight.data.add_(1)
        assert torch.equal(compiled(), owner.weight.to(BFLOAT) + 1)
    assert casts.bytes == 0


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_a_frozen_parameter_is_refused(change):
    owner = module()
    casts = ParameterCasts(owner, frozen=True)
    casts.get(owner.weight, BFLOAT)
    casts.check_frozen()
    with torch.no_grad():
        owner.weight.data.add_(1)
        change(owner)
    with pytest.raises(PrecisionError, match=r"weight|replaced"):
        casts.check_frozen()


def test_a_frozen_parameter_that_shares_its_memory_has_a_copy_and_is_checked():
    owner = module()
    array = owner.weight.detach().numpy()
    casts = ParameterCasts(owner, frozen=True)
    assert casts.get(owner.weight, BFLOAT) is casts.get(owner.weight, BFLOAT)
    array[0, 0] = 5
    with pytest.raises(PrecisionError, match=r"weight.*host\.frozen"):
        casts.check_frozen()


def test_a_step_refuses_a_frozen_parameter_that_was_written_to():
    owner = module()
    casts = ParameterCasts(owner, frozen=True)
    casts.get(owner.weight, BFLOAT)
    owner.weight.data.add_(1)
    with pytest.raises(PrecisionError, match="End the stream before parameters change"):
        casts.get(owner.weight, BFLOAT)


def test_frozen_parameters_have_copies_where_there_are_no_values_too():
    owner = module().to("meta")
    assert ParameterCasts(owner).get(owner.weight, BFLOAT).is_meta
    casts = ParameterCasts(owner, frozen=True)
    assert casts.get(owner.weight, BFLOAT) is casts.get(owner.weight, BFLOAT)


def test_a_frozen_parameter_may_be_nan():
    owner = module()
    owner.weight.data.fill_(float("nan"))
    casts = ParameterCasts(owner, frozen=True)
    casts.get(owner.weight, BFLOAT)
    casts.check_frozen()
