"""Precision policies: the table of the design, and why the default exists."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.core.errors import MoshiTTTError, PrecisionError
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM, PrecisionPolicy, check_role
from tests.core.toy import toy_registry

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
