"""The backends that a block computes with, chosen once for each device.

A training call's is chosen at the first of them; a streamed step's when the first stream's state is allocated. No step
of that stream then waits for a build, or reads a value. A block that was copied since chooses again, at its next step.

For a variant that has a C++ step and no other backends, what decides whether a block takes it is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import BackendError
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.backends import AUTO, Backend, BackendName, Chosen, Operation
from moshi_ttt.plugins.common.native import NativeLibrary

RunT = TypeVar("RunT")
CPP_DTYPES = (torch.float32, torch.float64)
LEAST_STATE = 2**20
"""Numbers of a stream's state, for C++ under ``auto``: 4 MiB in float32.

A step takes a time that grows with its state. For a smaller one the C++ saves some tenths of a millisecond, and a build
takes 10 to 40 seconds, or the steps of an hour's stream.
"""


class BlockWithBackends(SequenceBlock):
    """What computes each operation of a block, by the option ``backend``.

    Attributes:
        operations: the operations that have backends.
    """

    operations: ClassVar[tuple[Operation[Any, Any], ...]]

    _asked: dict[str, BackendName]
    _chosen: dict[str, dict[torch.device, Chosen[Any]]]

    def _ask(self, asked: Mapping[str, BackendName]) -> None:
        """Set the backend of each operation. Raises BackendError for a name that an operation does not have."""
        for operation in self.operations:
            if (name := asked[operation.name]) not in (AUTO, *operation.names):
                operation.choose(name, self._backend_use(self.info.device), str(self.info.site))
        self._asked = dict(asked)
        self._chosen = {operation: {} for operation in asked}

    def _backend_use(self, device: torch.device) -> Any:
        """What decides which backend can serve this block on ``device``."""
        raise NotImplementedError

    def use_backend(self, operation: str, name: BackendName, device: torch.device | None = None) -> None:
        """Compute an operation of this block by a backend from its next call on, whatever its options name.

        Raises BackendError, and changes nothing, where that backend cannot serve this block on ``device`` (None: the
        one it was built on), or where there is no such operation.
        """
        device = self.info.device if device is None else device
        chosen = self._choose(operation, name, device)
        self._asked = {**self._asked, operation: name}
        self._chosen[operation] = {device: chosen}

    def backends_in_use(self) -> dict[str, tuple[str, ...]]:
        """Of each operation that has been computed, or prepared for a stream, the names of the backends that do so."""
        return {
            name: tuple(sorted({each.name for each in kept.values()})) for name, kept in self._chosen.items() if kept
        }

    def allocate_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        """As the base class says; raises BackendError where the step's backend cannot be had there."""
        state = super().allocate_state(batch_size, device)
        if self.causal:
            self._backend_run("step", next(iter(state.values())).device)
        return state

    def compile_step(self) -> None:
        """The backend ``cpp`` for the step of this block, whatever its options name."""
        self.use_backend("step", "cpp")

    def _backend_run(self, operation: str, device: torch.device) -> Any:
        """The function that computes an operation on ``device``."""
        kept = self._chosen[operation]
        if device not in kept:
            kept[device] = self._choose(operation, self._asked[operation], device)
        return kept[device].run

    def _choose(self, operation: str, name: BackendName, device: torch.device) -> Chosen[Any]:
        for each in self.operations:
            if each.name == operation:
                return each.choose(name, self._backend_use(device), str(self.info.site))
        names = ", ".join(each.name for each in self.operations)
        raise BackendError(
            f"{self.info.site}: {operation!r} is not an operation with backends; {type(self).__name__} has {names}."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions, which a copy or a pickle chooses again."""
        return {**super().__getstate__(), "_chosen": {operation: {} for operation in self._asked}}

    def extra_repr(self) -> str:
        asked = ", ".join(f"{name}: {value}" for name, value in self._asked.items() if value != AUTO)
        used = ", ".join(f"{name}: {'/'.join(found)}" for name, found in self.backends_in_use().items())
        shown = f"backend={{{used or asked}}}" if used or asked else ""
        return ", ".join(part for part in (super().extra_repr(), shown) if part)


# ---- a variant with a C++ step


@dataclass(frozen=True)
class StepUse:
    """What decides whether a C++ step can serve a block.

    Attributes:
        device: of the state.
        dtype: of the state.
        numbers: how many numbers a stream's state has.
    """

    device: torch.device
    dtype: torch.dtype
    numbers: int


class BlockWithCompiledStep(BlockWithBackends):
    """A block whose streamed step, and nothing else, has backends."""

    def _state_numbers(self) -> int:
        """How many numbers a stream's state has, but for those that do not grow with the widths."""
        raise NotImplementedError

    def _backend_use(self, device: torch.device) -> StepUse:
        return StepUse(device, self.roles.state, self._state_numbers())


def not_cpp_step(use: StepUse, library: NativeLibrary) -> str | None:
    """Why a C++ step cannot serve a use, as the end of a sentence; None where it can."""
    if use.device.type != "cpu" or use.dtype not in CPP_DTYPES:
        return f"its state is {use.dtype} on {use.device}; the compiled step is for float32 and float64 on a CPU"
    return library.why_not()


def too_small_for_cpp(use: StepUse, library: NativeLibrary) -> str | None:
    """Why ``auto`` passes a C++ step by where it could serve; None where it takes it: any size where it is prebuilt."""
    if use.numbers >= LEAST_STATE or library.prebuilt() is not None:
        return None
    return (
        f"its state has {use.numbers:,} numbers for each stream, and C++ is built for {LEAST_STATE:,} or more; ask for "
        "it by name"
    )


def step_operation(library: NativeLibrary, load: Callable[[StepUse], RunT], by_torch: RunT) -> Operation[StepUse, RunT]:
    """A streamed step that ``load`` computes in C++ from ``library``, and ``by_torch`` by tensor operations."""
    cpp = Backend(
        name="cpp", load=load, why_not=lambda use: not_cpp_step(use, library),
        why_not_auto=lambda use: too_small_for_cpp(use, library),
    )  # fmt: skip
    return Operation("step", "a streamed step", (cpp, Backend(name="torch", load=lambda use: by_torch)))
