"""A cast, or an autocast, has one answer, whatever the block was called for before it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moshi_ttt import default_registry
from moshi_ttt.core.block import SiteKind
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.precision import FP32_STATE, UNIFORM
from moshi_ttt.core.state import map_state
from moshi_ttt.core.testing import BlockCase

from .conftest import VARIANTS, tiny_with

pytestmark = pytest.mark.each_kind

HOST_DTYPE, OTHER, LENGTH = torch.bfloat16, torch.float16, 5


def case_of(variant, policy=FP32_STATE):
    config = parse_block({"variant": variant, "chunk": 4}, registry=default_registry())
    return BlockCase(variant=variant, config=config, dtype=HOST_DTYPE, policy=policy)


def forward(case, block, x, state):
    return case.call(block, x)[0].detach()


def carried(case, block, x, state):
    return case.call(block, x, state)[0].detach()


def step(case, block, x, state):
    return case.step(block, x[:, :1], state).detach()


def longer_step(case, block, x, state):
    return case.step(block, x, state).detach()


CALLS = (forward, carried, step, longer_step)


# ------------------------------------------------------------------------------------------------- what ran before it
def nothing(case, block, x):
    return block


def training(case, block, x):
    case.call(block, x)[0].float().sum().backward()
    return block


def streaming(case, block, x):
    state = block.allocate_state(x.shape[0])
    for token in x.split(1, dim=1):
        case.step(block, token, state)
    return block


def autocast(case, block, x):
    with torch.autocast("cpu", HOST_DTYPE):
        case.call(block, x)
    return block


def a_refusal(case, block, x):
    with pytest.raises(PrecisionError):
        case.call(block, x.to(OTHER))
    return block


def loading(case, block, x):
    block.load_state_dict(block.state_dict())
    return training(case, block, x)


def casting(case, block, x):
    return training(case, block, x).to(OTHER)


def copying(case, block, x):
    return copy.deepcopy(streaming(case, block, x))


def meta(case, block, x):
    made = case.block("meta")
    case.call(made, x.to("meta"))
    made.info.mlp and made.info.mlp.to_empty(device="cpu").load_state_dict(block.info.mlp.state_dict())
    made.to_empty(device="cpu").load_state_dict(block.state_dict())
    return made


def fake(case, block, x):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        case.call(block, x)
    return block


BEFORE = (nothing, training, streaming, autocast, a_refusal, loading, casting, copying, meta, fake)


# --------------------------------------------------------------------------------------- what then, and what it raises
def as_it_should_be(case, block, x, state, call):
    call(case, block, x, state)


def other_activations(case, block, x, state, call):
    call(case, block, x.to(OTHER), state)


def other_parameter(case, block, x, state, call):
    last = list(block.parameters())[-1]
    last.data = last.data.to(OTHER)
    call(case, block, x, state)


def assigned_parameters(case, block, x, state, call):
    block.load_state_dict({name: tensor.to(OTHER) for name, tensor in block.state_dict().items()}, assign=True)
    call(case, block, x, state)


def other_state(case, block, x, state, call):
    cast = map_state(lambda tensor: tensor.to(OTHER) if tensor.is_floating_point() else tensor, state)
    call(case, block, x, cast)


def autocast_to_the_dtype_of_the_host(case, block, x, state, call):
    expected = call(case, block, x, map_state(torch.clone, state))
    with torch.autocast("cpu", HOST_DTYPE):
        assert torch.equal(call(case, block, x, state), expected)


def autocast_to_another_dtype(case, block, x, state, call):
    """Nothing of a sequence block is rounded by it; a feed-forward block's host MLP would be."""
    expected = call(case, block, x, map_state(torch.clone, state))
    with torch.autocast("cpu", OTHER):
        assert torch.equal(call(case, block, x, state), expected)


def refusal(then, kind, call):
    if then is other_activations:
        return r"call, layers\.0\.\w+: the host's activations is torch\.float16.*'param'"
    if then in (other_parameter, assigned_parameters):
        return r"call, layers\.0\.\w+: [\w.]+ is torch\.float16.*'master'"
    if then is other_state and call is not forward:
        return r"call, layers\.0\.\w+: [\w.]+ is torch\.float16.*'state'"
    if then is autocast_to_another_dtype and kind is SiteKind.FEED_FORWARD:
        return r"layers\.0\.feed_forward computes the host's own MLP, under an autocast to torch\.float16.*Leave"
    return None


THEN = (
    as_it_should_be, other_activations, other_parameter, assigned_parameters, other_state,
    autocast_to_the_dtype_of_the_host, autocast_to_another_dtype,
)  # fmt: skip


@pytest.mark.each_kind
@pytest.mark.filterwarnings("ignore:gating_mlp at")
@pytest.mark.parametrize("then", THEN, ids=lambda then: then.__name__)
@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__)
@pytest.mark.parametrize("variant", ["ttt_linear", "gating_mlp"])
def test_one_answer_whatever_ran_before(variant, before, then):
    case = case_of(variant)
    x = case.inputs(LENGTH)
    for call in CALLS:
        block = before(case, case.block(), x)
        state = block.allocate_state(x.shape[0])
        message = refusal(then, case.kind, call)
        for _ in range(2):  # and the second time as the first
            if message is None:
                then(case, block, x, state, call)
            else:
                with pytest.raises(PrecisionError, match=message):
                    then(case, block, x, state, call)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "ttt_ridge"])  # refuses that policy
def test_another_policy_is_held_to_its_own_dtypes(variant):
    case = case_of(variant, UNIFORM)
    block, x = case.block(), case.inputs(LENGTH)
    state = block.allocate_state(x.shape[0])
    case.step(block, x[:, :1], state)
    wide = map_state(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, state)
    with pytest.raises(PrecisionError, match=r"torch\.float32, but policy 'uniform' asks for torch\.bfloat16"):
        case.step(block, x[:, :1], wide)


@pytest.mark.parametrize("trained_first", [False, True])
def test_casting_a_whole_moshi_after_injection_is_refused_at_the_next_call(variant, trained_first):
    """Before: refused when it was the first call, accepted or a crash in a matrix product when it was not."""
    model, _ = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4})
    codes = torch.zeros(2, 17, 5, dtype=torch.int64)
    if trained_first:
        model.forward_text(codes)[1].sum().backward()
    model.to(torch.bfloat16)
    with pytest.raises(PrecisionError, match=r"layers\.1\.\w+: the host's activations is torch\.bfloat16"):
        model.forward_text(codes)
    with model.streaming(2), torch.no_grad(), pytest.raises(PrecisionError, match="the host's activations"):
        model.forward_text(codes[..., :1])
    model.to(torch.float32)
    model.forward_text(codes)


@pytest.mark.parametrize("trained_first", [False, True])
def test_autocast_in_a_moshi_of_another_dtype_is_refused(variant, trained_first):
    model, _ = tiny_with({"variant": variant, "layers": "1,3", "chunk": 4})
    codes = torch.zeros(2, 17, 5, dtype=torch.int64)
    if trained_first:
        model.forward_text(codes)[1].sum().backward()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PrecisionError, match=r"layers\.1\."):
        model.forward_text(codes)
    model.forward_text(codes)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:gating_mlp at")
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_answer_after_sharding(mesh, variant):
    case = case_of(variant)
    block, x = case.block(), case.inputs(LENGTH)
    fully_shard(block, mesh=mesh)
    for _ in range(2):
        case.call(block, x)[0].float().sum().backward()
        with pytest.raises(PrecisionError, match="the host's activations"):
            case.call(block, x.to(OTHER))
