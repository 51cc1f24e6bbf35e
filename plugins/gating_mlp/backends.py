"""The backends of the streamed step of ``gating_mlp``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moshi_ttt.plugins.common.backends import Backend, Operation
from moshi_ttt.plugins.common.block_backends import StepUse, not_cpp_step, too_small_for_cpp
from moshi_ttt.plugins.gating_mlp import compiled
from moshi_ttt.plugins.gating_mlp.compiled import CompiledStepper
from moshi_ttt.plugins.gating_mlp.memory import Memory
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper

MakesStepper = Callable[[Memory, Tensor], Stepper | CompiledStepper]
"""What makes the step of a plan and of states like a tensor."""

STEP: Operation[StepUse, MakesStepper] = Operation(
    "step",
    "a streamed step",
    (
        Backend(
            name="cpp",
            why_not=lambda use: not_cpp_step(use, compiled.LIBRARY),
            why_not_auto=lambda use: too_small_for_cpp(use, compiled.LIBRARY),
            load=compiled.load,
        ),
        Backend(name="torch", load=lambda use: Stepper),
    ),
)
