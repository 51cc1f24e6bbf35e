"""Precision policies: which dtype each role has.

A role is what a number is for, not where it lies. The default, ``fp32_state``, keeps what accumulates (fast weights,
trainable parameters, norms) in float32 and leaves the host's own numbers in the host's dtype. Third parties register
policies of their own through the same hook as the built-in ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from moshi_ttt.core.errors import PrecisionError

RoleDtype = Literal["model", "float32"]
"""``model``: the host's dtype. ``float32``: at least float32 (a float64 model stays float64 throughout)."""

MatmulPrecision = Literal["highest", "high", "medium"]
"""What torch may make of a product of float32 matrices, by the names of ``torch.set_float32_matmul_precision``."""

_PRECISIONS: dict[str, MatmulPrecision] = {"none": "highest", "ieee": "highest", "tf32": "high", "bf16": "medium"}


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
    matmul_precision: MatmulPrecision = "highest"

    @property
    def multiplies_float32(self) -> bool:
        """Whether a block may multiply float32 matrices."""
        return torch.float32 in (self.state, self.compute, self.matmul, self.output)


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
        matmul_precision: of products of float32 matrices in a block: ``highest`` computes them in float32, ``high`` in
            tf32, ``medium`` on a CPU in bfloat16. torch's own setting must be the same, or the block is not computed.
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
    matmul_precision: MatmulPrecision = "highest"

    def __post_init__(self) -> None:
        for name in _ROLES:
            if (value := getattr(self, name)) not in get_args(RoleDtype):
                allowed = ", ".join(get_args(RoleDtype))
                raise PrecisionError(f"Policy {self.name!r}: role {name!r} is {value!r}; allowed: {allowed}.")
        if self.matmul_precision not in get_args(MatmulPrecision):
            raise PrecisionError(
                f"Policy {self.name!r}: matmul_precision is {self.matmul_precision!r}; allowed: "
                f"{', '.join(get_args(MatmulPrecision))}."
            )

    def roles(self, model_dtype: torch.dtype) -> DtypeRoles:
        """The dtypes of all roles in a host whose parameters are ``model_dtype``."""
        wide = torch.promote_types(model_dtype, torch.float32)
        resolved = {name: model_dtype if getattr(self, name) == "model" else wide for name in _ROLES}
        return DtypeRoles(
            policy=self.name, model=model_dtype, matmul_precision=self.matmul_precision, **resolved
        )  # fmt: skip


_ROLES = [field.name for field in fields(PrecisionPolicy) if field.name not in ("name", "matmul_precision")]


FP32_STATE = PrecisionPolicy(name="fp32_state")
UNIFORM = PrecisionPolicy(
    name="uniform", master="model", param="model", state="model", compute="model", rope="float32", matmul="model",
    output="model",
)  # fmt: skip
FP32 = PrecisionPolicy(name="fp32", param="float32", matmul="float32")


def check_role(role: str, expected: torch.dtype, tensors: Iterable[tuple[str, Tensor]], policy: str, when: str) -> None:
    """Raise PrecisionError, which names the tensor, unless every floating-point tensor has its role's dtype."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != expected:
            raise PrecisionError(
                f"{when}: {name} is {tensor.dtype}, but policy {policy!r} asks for {expected} in the role {role!r}. "
                f"Load the host in that dtype, choose another policy, or remove what cast it."
            )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # traced anew when these settings change
def float32_products(device: str) -> MatmulPrecision:
    """The precision of torch's products of float32 matrices on ``cuda`` or ``cpu``, by whichever setting."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        if device == "cuda":
            return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
        return cast(MatmulPrecision, torch.get_float32_matmul_precision())
    # mkldnn.matmul has no type in torch's stubs.
    kept = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _PRECISIONS[kept.fp32_precision]


def check_products(roles: DtypeRoles, device: str, when: str) -> None:
    """Raise PrecisionError where torch's precision for a block's float32 products is not the policy's.

    The setting is of the whole process and read by every thread, that of the backward pass included: a block that set
    it would change what the host computes beside it. So it is compared and never set. A microsecond or two.
    """
    if not roles.multiplies_float32 or device not in ("cpu", "cuda"):
        return
    found: MatmulPrecision = float32_products(device)
    wanted = roles.matmul_precision
    if found == wanted or (device == "cuda" and "highest" not in (found, wanted)):  # there, both are tf32
        return
    raise PrecisionError(
        f"{when}: torch multiplies float32 matrices on {device} with precision {found!r}, and policy {roles.policy!r} "
        f"asks for {wanted!r} in blocks. Call torch.set_float32_matmul_precision({wanted!r}) (and undo what else set "
        "it: torch.backends.cuda.matmul.allow_tf32, fp32_precision, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), or register a "
        f"policy with matmul_precision={found!r}."
    )
