"""Backends: the ways to compute one operation of a block, and which of them a call takes.

An operation is ``train`` (a call of any length, with gradients) or ``step`` (one streamed token). A plugin lists the
backends of each in one ``Operation``, in the order in which ``auto`` prefers them. Each gives, in plain words, the
reason why it cannot serve a call; ``auto`` takes the first that has none. A backend that is asked for by name serves or
raises: there is no other in its place.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from moshi_ttt.core.errors import BackendError

logger = logging.getLogger("moshi_ttt.backends")

AUTO = "auto"
BackendName = Literal["auto", "naive", "torch", "compile", "cpp", "triton"]
"""``naive``: the definition, slow. ``torch``: tensor operations. ``compile``: those, by torch.compile. ``cpp``: C++,
for CPUs. ``triton``: Triton kernels, for NVIDIA GPUs. ``auto``: the first that can, in each operation's own order."""

UseT = TypeVar("UseT")
RunT = TypeVar("RunT")


def _no_reason(use: object) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend(Generic[UseT, RunT]):
    """One way to compute an operation. ``UseT`` describes the calls: device, dtype, shapes, options.

    Attributes:
        name: one of ``BackendName``.
        why_not: the reason why it cannot serve a use, as the end of a sentence; None where it can. It builds and
            imports nothing that takes long.
        why_not_auto: the reason why ``auto`` passes it by where it could serve; None where ``auto`` takes it.
        load: the function that computes the operation. It may import or build; it raises BackendError where that fails.
    """

    name: BackendName
    why_not: Callable[[UseT], str | None] = _no_reason
    why_not_auto: Callable[[UseT], str | None] = _no_reason
    load: Callable[[UseT], RunT]


@dataclass(frozen=True)
class Chosen(Generic[RunT]):
    """The backend that a use gets: its name, and the function that computes the operation."""

    name: BackendName
    run: RunT


@dataclass(frozen=True)
class Operation(Generic[UseT, RunT]):
    """An operation of a block and its backends.

    Attributes:
        name: as the option ``backend`` names it.
        what: the operation in words, for messages.
        backends: in the order in which ``auto`` prefers them. The last one that ``auto`` takes serves every use.
    """

    name: str
    what: str
    backends: Sequence[Backend[UseT, RunT]]

    @property
    def names(self) -> tuple[BackendName, ...]:
        return tuple(backend.name for backend in self.backends)

    def reasons(self, use: UseT) -> dict[BackendName, str | None]:
        """Of each backend, why it cannot serve ``use``; None where it can."""
        return {backend.name: backend.why_not(use) for backend in self.backends}

    def choose(self, name: BackendName, use: UseT, where: str) -> Chosen[RunT]:
        """The backend for ``use``: that of a ``name``, or under ``auto`` the first that can. See ``reasons``.

        Args:
            where: what asks, for messages.

        Raises:
            BackendError: the one asked for cannot serve, or does not exist for this operation.
        """
        if name == AUTO:
            return self._first(use, where)
        backend = next((each for each in self.backends if each.name == name), None)
        reason = "there is none" if backend is None else backend.why_not(use)
        if backend is None or reason is not None:
            raise BackendError(self._refusal(name, reason, use, where))
        return Chosen(backend.name, backend.load(use))

    def _first(self, use: UseT, where: str) -> Chosen[RunT]:
        for backend in self.backends:
            reason = backend.why_not(use)
            reason = backend.why_not_auto(use) if reason is None else reason
            if reason is None:
                try:
                    return Chosen(backend.name, backend.load(use))
                except BackendError as error:
                    reason = str(error)
            log_once(f"backend auto, {self.what}: not {backend.name}: {reason}")
        raise BackendError(self._refusal(AUTO, "no backend serves it", use, where))

    def _refusal(self, name: str, reason: str | None, use: UseT, where: str) -> str:
        able = [each for each, why in self.reasons(use).items() if why is None]
        return (
            f"{where}: backend: {name} was asked for {self.what}, and cannot be had: {reason}. Here, it can be "
            f"{', '.join((AUTO, *able))}. Set one of these, as in backend: {{{self.name}: {AUTO}}}; the results are "
            "the same."
        )


@functools.cache
def log_once(message: str) -> None:
    """Log a message once in this process, however many blocks it is true of."""
    logger.info(message)
