"""Precision policies: which dtype each role has.

A role is what a number is for, not where it lies. The default, ``fp32_state``, keeps what accumulates (fast weights,
trainable parameters, norms) in float32 and leaves the host's own numbers in the host's dtype. Third parties register
policies of their own through the same hook as the built-in ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from moshi_ttt.core.errors import PrecisionError

RoleDtype = Literal["model", "float32"]
"""``model``: the host's dtype. ``float32``: at least float32 (a float64 model stays float64 throughout)."""


@dataclass(frozen=True, kw_only=True)
class DtypeRoles:
    """A policy resolved for one host dtype. One dtype a role; see ``PrecisionPolicy`` for what the roles are."""

    policy: str
    model: torch.dtype
    master: torch.dtype
    param: torch.dtype
    state: torch.dtype
    compute: torch.dtype
    rope: torch.dtype
    matmul: torch.dtype
    reduce: torch.dtype
    output: torch.dtype


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """A dtype for each role.

    Attributes:
        name: the name a config selects it by.
        master: a block's parameters as stored (initial fast weights and gates among them), optimizer moments.
        param: frozen host parameters as stored, and as a sharded host layer gathers them.
        state: fast weights and the unfinished chunk; the inner loop multiplies in this dtype.
        compute: L2 norm, reconstruction target, post norm, learned rates.
        rope: rotary embedding (the input's dtype is restored afterwards).
        matmul: inputs of the block's projections.
        reduce: gradient reduction across ranks.
        output: where the gated update is added to the residual, before the sum is cast to the input's dtype.
    """

    name: str
    master: RoleDtype = "float32"
    param: RoleDtype = "model"
    state: RoleDtype = "float32"
    compute: RoleDtype = "float32"
    rope: RoleDtype = "float32"
    matmul: RoleDtype = "model"
    reduce: RoleDtype = "float32"
    output: RoleDtype = "float32"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value not in get_args(RoleDtype):
                allowed = ", ".join(get_args(RoleDtype))
                raise PrecisionError(f"Policy {self.name!r}: role {field.name!r} is {value!r}; allowed: {allowed}.")

    def roles(self, model_dtype: torch.dtype) -> DtypeRoles:
        """The dtypes of all roles in a host whose parameters are ``model_dtype``."""
        wide = torch.promote_types(model_dtype, torch.float32)
        resolved = {
            field.name: model_dtype if getattr(self, field.name) == "model" else wide
            for field in fields(self)
            if field.name != "name"
        }
        return DtypeRoles(policy=self.name, model=model_dtype, **resolved)


FP32_STATE = PrecisionPolicy(name="fp32_state")
UNIFORM = PrecisionPolicy(
    name="uniform", master="model", param="model", state="model", compute="model", rope="float32", matmul="model",
    output="model",
)  # fmt: skip
FP32 = PrecisionPolicy(name="fp32", param="float32", matmul="float32")


def check_role(role: str, expected: torch.dtype, tensors: Iterable[tuple[str, Tensor]], policy: str, when: str) -> None:
    """Every floating-point tensor has its role's dtype, or PrecisionError names the first that does not."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != expected:
            raise PrecisionError(
                f"{when}: {name} is {tensor.dtype}, but policy {policy!r} asks for {expected} in the role {role!r}. "
                f"Load the host in that dtype, choose another policy, or remove what cast it."
            )
