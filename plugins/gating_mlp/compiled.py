"""The compiled step: step.cpp, built on the machine that streams. The same results as recurrent.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.native import NativeLibrary, common_headers, compiled_step
from moshi_ttt.plugins.common.success_gate import SuccessGate
from moshi_ttt.plugins.gating_mlp.memory import Memory

LIBRARY = NativeLibrary(
    name="moshi_ttt_gating_mlp",
    what="The compiled step of gating_mlp",
    source=Path(__file__).with_name("step.cpp"),
    headers=(Path(__file__).with_name("corrections.h"), *common_headers("success_gate", "vectors")),
    otherwise="With backend: {step: torch} the same results come from tensor operations.",
)
OPTIONAL = ("norm", "factor", "answer", "scores")
"""Parts of the state that only some options have, in the order in which the compiled step takes them."""


class CompiledStepper:
    """Streams rows whose state is on a CPU, in float32 or float64; holds no state."""

    def __init__(self, memory: Memory, like: Tensor) -> None:
        schedule = memory.schedule
        self.decay, self.clip = memory.decay, memory.clip
        self.corrects = memory.update_rule != "hebbian"
        self.limit = largest_factor(like.dtype)
        self.plan = [
            schedule.chunk, schedule.staged, schedule.moves, schedule.slice, schedule.look_ahead, memory.first_tap,
            memory.taps,
        ]  # fmt: skip
        self.run = operation()

    def step(
        self, state: BlockState, token: tuple[Tensor, Tensor, Tensor], conv: Tensor, projection: Tensor,
        active: Tensor | None, updated: Tensor | None = None, cast: object = None, *, ridge: Tensor | None = None,
        success: SuccessGate | None = None,
    ) -> Tensor:  # fmt: skip
        """See ``Stepper.step``; what is cast here is cast in registers."""
        gate = [] if success is None else [part.to(token[0]) for part in (success.bias, success.slope, success.weights)]
        added: Tensor = self.run(
            *token, state["position"], state["delta"], state["keys"], state["values"], state["open"], state["scale"],
            state["spoiled"], state["skipped"], state["enabled"], *(state.get(name) for name in OPTIONAL),
            conv, projection, active, updated, ridge, gate, self.plan, self.decay, self.limit, self.clip, self.corrects,
        )  # fmt: skip
        return added


def load(use: object) -> type[CompiledStepper]:
    """``CompiledStepper``, built. Raises BackendError where it cannot be built."""
    operation()
    return CompiledStepper


def accelerations() -> tuple[Acceleration, ...]:
    """The faster forms of gating_mlp on this machine."""
    return (compiled_step(LIBRARY, "backend.step"),)


@functools.cache
def operation() -> Any:
    """step.cpp as an operation of torch's. Raises BackendError where it cannot be built."""
    LIBRARY.load()
    torch.library.register_fake(f"{LIBRARY.name}::step", _shape)
    return getattr(torch.ops, LIBRARY.name).step.default


def _shape(key: Tensor, target: Tensor, *others: Any, **named: Any) -> Tensor:
    """A tensor like the result, for tensors without values."""
    return torch.empty_like(target)
