"""The backends of the streamed step of ``ttt_ridge``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.backends import Operation
from moshi_ttt.plugins.common.block_backends import StepUse, step_operation
from moshi_ttt.plugins.ttt_ridge import compiled
from moshi_ttt.plugins.ttt_ridge.memory import Read, RidgeTokens, Rule
from moshi_ttt.plugins.ttt_ridge.recurrent import recurrent_ridge


class RidgeStep(Protocol):
    """One token of every stream, in place, as ``recurrent_ridge``."""

    def __call__(
        self, tokens: RidgeTokens, state: BlockState, rule: Rule, chunk_size: int, exec_mask: Tensor | None = None
    ) -> Read: ...


STEP: Operation[StepUse, RidgeStep] = step_operation(compiled.LIBRARY, compiled.load, recurrent_ridge)
