"""The backends that a block of the TTT layer computes with."""

from __future__ import annotations

from typing import Any

import torch

from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common.backends import AUTO, BackendName
from moshi_ttt.plugins.common.block_backends import BlockWithBackends
from moshi_ttt.plugins.hybrid.backends import STEP, TRAIN, HybridUse, StepRun, TrainRun
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.chunk_gradient import WholeChunks
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.parameters import HybridParameters
from moshi_ttt.plugins.hybrid.triton.train import TritonTrain


class HybridWithBackends(BlockWithBackends, HybridParameters):
    """The parameters of a TTT layer, and what computes its inner loop, by the option ``backend``."""

    operations = (TRAIN, STEP)

    def __init__(self, config: HybridConfig, *given: Any) -> None:
        super().__init__(config, *given)
        named = config.backends()
        self._ask({"train": named.train, "step": named.step})

    def use_backend(self, operation: str, name: BackendName, device: torch.device | None = None) -> None:
        if operation == "train" and "compute" in vars(self):
            self._check_traced(name)
        super().use_backend(operation, name, device)

    def compile_compute(self) -> None:
        self._check_traced(self._asked["train"])
        super().compile_compute()

    def _check_traced(self, name: str) -> None:
        """Raise BackendError for a backend that torch.compile would lose: it traces the torch form."""
        if name not in (AUTO, "torch", "compile"):
            raise BackendError(
                f"{self.info.site}: backend: {name} was asked for a training call, and torch.compile compiles tensor "
                "operations alone. Set backend: {train: auto}, or do not compile the block."
            )

    def _backend_use(self, device: torch.device) -> HybridUse:
        widths = self.widths(self.config, self.info.dim // self.info.num_heads)
        return HybridUse(
            self.config, widths, device, self.roles.state, self.roles.matmul_precision, type(self), self.info.dtype
        )

    def _train_run(self, device: torch.device) -> TrainRun:
        if torch.compiler.is_compiling():  # see compile_compute
            return chunk_inner_loop
        run: TrainRun = self._backend_run("train", device)
        return run

    def _kernels(self, device: torch.device) -> WholeChunks | None:
        """The kernels for whole chunks, where those have been chosen for training calls on ``device``."""
        chosen = self._chosen["train"].get(device)
        return chosen.run.whole if chosen is not None and isinstance(chosen.run, TritonTrain) else None

    def _step_run(self, device: torch.device) -> StepRun:
        run: StepRun = self._backend_run("step", device)
        return run
