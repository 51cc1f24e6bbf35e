"""The backends that a block of the TTT layer computes with: chosen at its first call on a device, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common.backends import AUTO, BackendName, Chosen
from moshi_ttt.plugins.hybrid.backends import STEP, TRAIN, HybridUse, StepRun, TrainRun
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.chunk_gradient import WholeChunks
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.parameters import HybridParameters
from moshi_ttt.plugins.hybrid.triton.train import TritonTrain


class BlockWithBackends(HybridParameters):
    """The parameters of a TTT layer, and what computes its inner loop, by the option ``backend``."""

    def __init__(self, config: HybridConfig, *given: Any) -> None:
        super().__init__(config, *given)
        self._asked = config.backends()
        self._trains: dict[torch.device, Chosen[TrainRun]] = {}
        self._steps: dict[torch.device, Chosen[StepRun]] = {}

    def use_backend(
        self, operation: Literal["train", "step"], name: BackendName, device: torch.device | None = None
    ) -> None:
        """Compute an operation of this block by a backend from its next call on, whatever its options name.

        Raises BackendError, and changes nothing, where that backend cannot serve this block on ``device`` (None: the
        one it was built on).
        """
        device = self.info.device if device is None else device
        if operation == "train" and "compute" in vars(self):
            self._check_traced(name)
        chosen = (TRAIN if operation == "train" else STEP).choose(name, self._use(device), str(self.info.site))
        self._asked = self._asked.model_copy(update={operation: name})
        kept: dict[torch.device, Any] = self._trains if operation == "train" else self._steps
        kept.clear()
        kept[device] = chosen

    def backends_in_use(self) -> dict[str, tuple[str, ...]]:
        """Of each operation that has been computed, the names of the backends that do so."""
        kept: dict[str, Mapping[torch.device, Chosen[Any]]] = {"train": self._trains, "step": self._steps}
        return {name: tuple(sorted({each.name for each in found.values()})) for name, found in kept.items() if found}

    def compile_compute(self) -> None:
        self._check_traced(self._asked.train)
        super().compile_compute()

    def _check_traced(self, name: str) -> None:
        """Raise BackendError for a backend that torch.compile would lose: it traces the torch form."""
        if name not in (AUTO, "torch", "compile"):
            raise BackendError(
                f"{self.info.site}: backend: {name} was asked for a training call, and torch.compile compiles tensor "
                "operations alone. Set backend: {train: auto}, or do not compile the block."
            )

    def _use(self, device: torch.device) -> HybridUse:
        widths = self.widths(self.config, self.info.dim // self.info.num_heads)
        return HybridUse(self.config, widths, device, self.roles.state, self.roles.matmul_precision)

    def _train_run(self, device: torch.device) -> TrainRun:
        if torch.compiler.is_compiling():  # see compile_compute
            return chunk_inner_loop
        if device not in self._trains:
            self._trains[device] = TRAIN.choose(self._asked.train, self._use(device), str(self.info.site))
        return self._trains[device].run

    def _kernels(self, device: torch.device) -> WholeChunks | None:
        """The kernels for whole chunks, where those have been chosen for training calls on ``device``."""
        chosen = self._trains.get(device)
        return chosen.run.whole if chosen is not None and isinstance(chosen.run, TritonTrain) else None

    def _step_run(self, device: torch.device) -> StepRun:
        if device not in self._steps:
            self._steps[device] = STEP.choose(self._asked.step, self._use(device), str(self.info.site))
        return self._steps[device].run

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions, which a copy or a pickle chooses again."""
        return {**super().__getstate__(), "_trains": {}, "_steps": {}}

    def extra_repr(self) -> str:
        asked = ", ".join(f"{name}: {value}" for name, value in self._asked if value not in (AUTO, False))
        used = ", ".join(f"{name}: {'/'.join(found)}" for name, found in self.backends_in_use().items())
        shown = f", backend={{{used or asked}}}" if used or asked else ""
        return f"{super().extra_repr()}{shown}"
