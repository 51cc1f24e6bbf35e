"""Precision policies: the table of the design, and why the default exists."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.errors import MoshiTTTError, PrecisionError
from moshi_ttt.core.precision import (
    FP32,
    FP32_STATE,
    UNIFORM,
    PrecisionPolicy,
    check_products,
    check_role,
    float32_products,
)
from tests.unit.core.toy import DIM, toy_block, toy_registry

B, F, D = torch.bfloat16, torch.float32, torch.float64
ROLES = ("master", "param", "state", "compute", "rope", "matmul", "reduce", "output")


@pytest.mark.parametrize(
    ("policy", "model_dtype", "expected"),
    [
        (FP32_STATE, B, (F, B, F, F, F, B, F, F)),
        (FP32_STATE, F, (F,) * 8),
        (FP32_STATE, D, (D,) * 8),
        (UNIFORM, B, (B, B, B, B, F, B, F, B)),
        (UNIFORM, F, (F,) * 8),
        (UNIFORM, D, (D,) * 8),
        (FP32, B, (F,) * 8),
        (FP32, F, (F,) * 8),
        (FP32, D, (D,) * 8),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_table(policy, model_dtype, expected):
    roles = policy.roles(model_dtype)
    assert dict(zip(ROLES, expected, strict=True)) == {role: getattr(roles, role) for role in ROLES}
    assert (roles.model, roles.policy) == (model_dtype, policy.name)


def test_third_party_policy_is_found_by_name():
    registry = toy_registry()
    registry.register("precision_policy", "half_memory", PrecisionPolicy(name="half_memory", state="model"))
    roles = registry.policy("half_memory").roles(B)
    assert (roles.state, roles.master) == (B, F)


def test_unknown_policy_names_the_nearest():
    with pytest.raises(MoshiTTTError, match="Did you mean 'fp32_state'"):
        toy_registry().policy("fp32_stat")


def test_role_that_means_nothing_raises():
    with pytest.raises(ValueError, match="bfloat16"):
        PrecisionPolicy(name="mine", state="bfloat16").roles(B)  # type: ignore[arg-type]


def test_check_role_names_the_tensor():
    tensors = [
        ("good", torch.zeros(1)),
        ("counter", torch.zeros(1, dtype=torch.int64)),
        ("w1", torch.zeros(1, dtype=B)),
    ]
    with pytest.raises(PrecisionError, match=r"load: w1 is torch\.bfloat16.*'fp32_state'.*torch\.float32.*'state'"):
        check_role("state", F, tensors, "fp32_state", "load")
    check_role("state", F, tensors[:2], "fp32_state", "load")


@pytest.mark.parametrize(("policy", "survives"), [(FP32_STATE, True), (UNIFORM, False)], ids=lambda v: str(v)[:20])
def test_small_updates_survive_in_float32_and_are_lost_in_bfloat16(policy, survives):
    # Next to 1.0 a bfloat16 ulp is 2**-7. A thousand updates of a quarter of it add up to 250 ulps, or to nothing.
    quarter_ulp = 2.0**-9
    weight = torch.ones(4, dtype=policy.roles(B).state)
    for _ in range(1_000):
        weight += torch.tensor(quarter_ulp).to(weight.dtype)
    expected = 1.0 + 1_000 * quarter_ulp if survives else 1.0
    assert torch.equal(weight.double(), torch.full((4,), expected, dtype=D))


# ---- products of float32 matrices


@pytest.fixture
def products():
    """Sets torch's precision, and puts it back."""
    yield torch.set_float32_matmul_precision
    mkldnn("none")
    torch.set_float32_matmul_precision("highest")
    mkldnn("none")


@pytest.fixture
def dynamo():
    """The compiler, which forgets afterwards what it met here: it leaves code that raised alone from then on."""
    yield
    torch._dynamo.reset()


HIGH = PrecisionPolicy(name="tf32_inside", matmul_precision="high")


def mkldnn(value):
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = value


@pytest.mark.parametrize(
    ("policy", "set_to", "found"),
    [
        (FP32_STATE, lambda: torch.set_float32_matmul_precision("high"), "high"),
        (FP32_STATE, lambda: torch.set_float32_matmul_precision("medium"), "medium"),
        (FP32_STATE, lambda: mkldnn("bf16"), "medium"),
        (FP32_STATE, lambda: torch.set_float32_matmul_precision("highest"), None),
        (FP32, lambda: torch.set_float32_matmul_precision("high"), "high"),
        (HIGH, lambda: torch.set_float32_matmul_precision("high"), None),
        (HIGH, lambda: torch.set_float32_matmul_precision("highest"), "highest"),
    ],
)
def test_products_have_the_precision_of_the_policy_or_are_refused(policy, set_to, found, products):
    """Before: outputs moved by 6e-5 and gradients by up to 5e-4 (emulated), in silence."""
    block, x = toy_block(policy=policy), torch.randn(2, 3, DIM)
    state = block.allocate_state(2)
    set_to()
    if found is not None and float32_products("cpu") != found:
        pytest.skip("this torch has no such setting")
    calls = (lambda: block(x), lambda: block(x, state), lambda: block.step(x[:, :1], state))
    for call in calls:
        if found is None:
            call()
            continue
        message = (
            rf"call, layers\.1\.sequence: .* on cpu with precision '{found}', and policy '{policy.name}' asks for '"
        )
        with pytest.raises(PrecisionError, match=message):
            call()


def test_a_setting_that_changes_before_the_backward_pass_is_refused_there(products):
    block, x = toy_block(), torch.randn(2, 3, DIM, requires_grad=True)
    y, _ = block(x)
    products("high")
    with pytest.raises(PrecisionError, match=r"backward pass, layers\.1\.sequence: .*set_float32_matmul_precision"):
        y.sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in block.parameters())
    products("highest")
    y.sum().backward()
    assert x.grad is not None


def test_a_block_leaves_the_setting_as_it_is(products):
    block = toy_block(policy=HIGH)
    products("high")
    block(torch.randn(2, 3, DIM))[0].sum().backward()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("policy", "dtype"), [(UNIFORM, B), (FP32_STATE, D)])
def test_a_block_without_float32_products_does_not_mind(policy, dtype, products):
    block = toy_block(policy=policy, dtype=dtype)
    products("high")
    block(torch.randn(2, 3, DIM, dtype=dtype))


def test_on_cuda_every_way_to_ask_for_tf32_is_seen(products):
    roles = FP32_STATE.roles(B)
    check_products(roles, "cuda", "here")
    for asked in (lambda: products("high"), lambda: products("medium"), allow_tf32):
        asked()
        with pytest.raises(PrecisionError, match=r"here: .* on cuda with precision 'high'"):
            check_products(roles, "cuda", "here")
        for coarse in ("high", "medium"):
            check_products(PrecisionPolicy(name="coarse", matmul_precision=coarse).roles(B), "cuda", "here")
        products("highest")


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def test_a_compiled_block_follows_the_setting(products, dynamo):
    block, x = toy_block(), torch.randn(2, 3, DIM)
    traced = torch.compile(lambda x: block(x, None, None)[0], backend="eager")
    traced(x)
    products("high")
    with pytest.raises(PrecisionError, match="precision 'high'"):
        traced(x)
    products("highest")
    traced(x)


def test_a_precision_that_torch_does_not_know_is_refused():
    with pytest.raises(PrecisionError, match="matmul_precision is 'tf32'; allowed: highest, high, medium"):
        PrecisionPolicy(name="mine", matmul_precision="tf32")  # type: ignore[arg-type]
