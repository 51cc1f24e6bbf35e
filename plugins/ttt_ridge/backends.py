"""The backends of the streamed step of ``ttt_ridge``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.backends import Backend, Operation
from moshi_ttt.plugins.common.block_backends import StepUse, not_cpp_step, too_small_for_cpp
from moshi_ttt.plugins.ttt_ridge import compiled
from moshi_ttt.plugins.ttt_ridge.memory import Read, RidgeTokens, Rule
from moshi_ttt.plugins.ttt_ridge.recurrent import recurrent_ridge


class RidgeStep(Protocol):
    """One token of every stream, in place, as ``recurrent_ridge``."""

    def __call__(
        self, tokens: RidgeTokens, state: BlockState, rule: Rule, chunk_size: int, exec_mask: Tensor | None = None
    ) -> Read: ...


STEP: Operation[StepUse, RidgeStep] = Operation(
    "step",
    "a streamed step",
    (
        Backend(
            name="cpp",
            why_not=lambda use: not_cpp_step(use, compiled.LIBRARY),
            why_not_auto=lambda use: too_small_for_cpp(use, compiled.LIBRARY),
            load=compiled.load,
        ),
        Backend(name="torch", load=lambda use: recurrent_ridge),
    ),
)
