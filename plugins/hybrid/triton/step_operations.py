"""The kernels of a streamed step as operations of torch, so that a step also runs on tensors without values.

Nothing is registered, and Triton is not imported, until ``operations`` is called.

Shape legend: B rows, H heads, C tokens a chunk, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "moshi_ttt_hybrid_triton"
TOKENS = "Tensor q, Tensor k, Tensor v, Tensor lr"
MASKS = "Tensor? active, Tensor? updated"
SCHEMAS = {
    "prepare": "(Tensor x, Tensor q, Tensor k, Tensor v, Tensor? given, Tensor? updated, Tensor? active, "
    "Tensor position, Tensor spoiled, Tensor lr_weight, Tensor lr_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor offset, float base_rate, float factor, float theta, float eps, float limit) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "look": f"({TOKENS}, Tensor? active, Tensor position, Tensor spoiled, int chunk, float limit) -> (Tensor, Tensor)",
    "inner": f"({TOKENS}, Tensor ok, Tensor now, Tensor scale, Tensor(a!) position, Tensor(b!) spoiled, "
    "Tensor(c!) skipped, Tensor(d!)[] weights, Tensor(e!)[] biases, Tensor(f!)[] inputs, Tensor(g!)[] gradients, "
    f"Tensor norm_weight, Tensor norm_bias, {MASKS}, float eps) -> Tensor",
    "norm": "(Tensor y, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    "gate": "(Tensor x, Tensor added, Tensor alpha, Tensor? volumes, float volume) -> Tensor",
}
"""What torch sees of a step: one operation for each group of launches."""


def _launches() -> ModuleType:
    """The kernels, imported when one is to run."""
    from moshi_ttt.plugins.hybrid.triton import step_launches

    return step_launches


@functools.cache
def operations() -> Any:
    """The operations of ``SCHEMAS``, for tensors with values and, but for the values, for those without."""
    library = torch.library.Library(NAME, "DEF")
    computed: dict[str, Callable[..., Any]] = {
        "prepare": _prepare,
        "look": _look,
        "inner": _inner,
        "norm": _norm,
        "gate": _gate,
    }
    shaped = {
        "prepare": _prepared_shapes, "look": _looked_shapes, "inner": _inner_shape, "norm": _norm_shape,
        "gate": _gate_shape,
    }  # fmt: skip
    for name, schema in SCHEMAS.items():
        library.define(f"{name}{schema}")
        for key in ("CPU", "CUDA"):
            library.impl(name, _on_device(computed[name]), key)
        torch.library.register_fake(f"{NAME}::{name}", shaped[name], lib=library)
    found = {name: getattr(getattr(torch.ops, NAME), name).default for name in SCHEMAS}
    return _Operations(library, found)


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on the device of its first tensor, which Triton launches on, and of contiguous tensors.

    A tensor that is contiguous is given as it is. Those of a state, which are written to, have been checked.
    """

    @functools.wraps(function)
    def run(tensor: Tensor, *others: Any) -> Any:
        given = [each.contiguous() if isinstance(each, Tensor) else each for each in (tensor, *others)]
        with torch.cuda.device_of(tensor):
            return function(*given)

    return run


class _Operations:
    """The operations as attributes; they exist as long as this does."""

    def __init__(self, library: torch.library.Library, found: dict[str, Any]) -> None:
        self.library = library
        self.__dict__ |= found

    def __getattr__(self, name: str) -> Any:  # for type checkers: every operation is set above
        raise AttributeError(name)


def _prepare(*given: Any) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _launches().prepare(*given)
    return made


def _look(*given: Any) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = _launches().look(*given)
    return made


def _inner(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, ok: Tensor, now: Tensor, scale: Tensor, position: Tensor,
    spoiled: Tensor, skipped: Tensor, weights: list[Tensor], biases: list[Tensor], inputs: list[Tensor],
    gradients: list[Tensor], norm_weight: Tensor, norm_bias: Tensor, active: Tensor | None, updated: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    launches = _launches()
    state = launches.InnerState(
        position=position, spoiled=spoiled, skipped=skipped, weights=weights, biases=biases, inputs=inputs,
        gradients=gradients,
    )  # fmt: skip
    step = launches.InnerStep(
        (q, k, v, lr), ok, now, scale, state, (norm_weight, norm_bias), active, updated, eps
    )  # fmt: skip
    made: Tensor = step.run()
    return made


def _norm(*given: Any) -> Tensor:
    made: Tensor = _launches().norm(*given)
    return made


def _gate(*given: Any) -> Tensor:
    made: Tensor = _launches().gate(*given)
    return made


def _prepared_shapes(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    norm_weight, offset = others[10], others[12]
    (heads, width), batch = norm_weight.shape, x.shape[0]
    tokens = [x.new_empty(batch, 1, heads, width, dtype=torch.float32) for _ in range(3)]
    ok, now = (x.new_empty(batch, size, dtype=torch.int32) for size in (heads, 2))
    lr, scale = (x.new_empty(shape, dtype=torch.float32) for shape in ((batch, 1, heads), offset.shape))
    return (*tokens, lr, ok, now, scale)


def _looked_shapes(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.int32), q.new_empty(q.shape[0], 2, dtype=torch.int32)


def _inner_shape(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[2] * q.shape[3])


def _norm_shape(y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(y, dtype=dtype)


def _gate_shape(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)
