"""The backends of the streamed step of ``gating_mlp``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moshi_ttt.plugins.common.backends import Operation
from moshi_ttt.plugins.common.block_backends import StepUse, step_operation
from moshi_ttt.plugins.gating_mlp import compiled
from moshi_ttt.plugins.gating_mlp.compiled import CompiledStepper
from moshi_ttt.plugins.gating_mlp.memory import Memory
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper

MakesStepper = Callable[[Memory, Tensor], Stepper | CompiledStepper]
"""What makes the step of a plan and of states like a tensor."""

STEP: Operation[StepUse, MakesStepper] = step_operation(compiled.LIBRARY, compiled.load, Stepper)
