"""The compiled step: step.cpp, built on the machine that streams. The same results as recurrent.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.native import NativeLibrary, common_headers, compiled_step
from moshi_ttt.plugins.ttt_ridge.memory import Read, RidgeTokens, Rule

LIBRARY = NativeLibrary(
    name="moshi_ttt_ridge",
    what="The compiled step of ttt_ridge",
    source=Path(__file__).with_name("step.cpp"),
    headers=common_headers("parallel", "success_gate", "vectors"),
    flags=("-march=native", "-ffp-contract=off"),
    otherwise="With backend: {step: torch} the same results come from tensor operations.",
)


@functools.cache
def operation() -> Any:
    """step.cpp as an operation of torch's. Raises BackendError where it cannot be built."""
    LIBRARY.load()
    torch.library.register_fake(f"{LIBRARY.name}::step", _shapes)
    return getattr(torch.ops, LIBRARY.name).step.default


def load(use: object) -> Callable[..., Read]:
    """``compiled_ridge``, built. Raises BackendError where it cannot be built."""
    operation()
    return compiled_ridge


def compiled_ridge(
    tokens: RidgeTokens, state: BlockState, rule: Rule, chunk_size: int, exec_mask: Tensor | None = None
) -> Read:
    """As ``recurrent_ridge``, with zeros in rows where ``exec_mask`` is false."""
    value, variance = operation()(
        *tokens, state["position"], state["solution"], state["pending"], state["covariance"], state.get("coordinate"),
        state.get("covariance_read"), rule.regularization, [] if rule.novelty is None else list(rule.novelty),
        exec_mask, rule.keep, rule.variance, chunk_size,
    )  # fmt: skip
    return Read(value, variance if rule.variance else None)


def accelerations() -> tuple[Acceleration, ...]:
    """The faster forms of ttt_ridge on this machine."""
    return (compiled_step(LIBRARY, "backend.step"),)


def _shapes(q: Tensor, k: Tensor, v: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """Tensors like the results, for tensors without values."""
    variance = others[-2] if len(others) > 1 else named["variance"]
    return v.new_empty(v.shape), v.new_empty(v.shape[0] if variance else 0, 1, v.shape[2])
