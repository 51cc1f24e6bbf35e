"""Faster forms of a variant's computation, and why one cannot be used on this machine.

A plugin registers a function by the hook ``moshi_ttt_accelerations``, under the name of the variant. The function takes
nothing and returns one ``Acceleration`` for each form that the variant has beside tensor operations. It looks at the
machine, and builds nothing: ``moshi-ttt info`` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moshi_ttt.core.errors import PluginError

if TYPE_CHECKING:
    from moshi_ttt.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """One faster form of a variant's computation.

    Attributes:
        name: of the form, such as ``compiled step``.
        purpose: what it computes and how it is chosen, as one sentence.
        missing: why this machine cannot use it and what to do, as one sentence; empty where it can.
        origin: where its compiled code comes from, as one sentence such as ``Built at first use.``; empty where there
            is nothing to say.
    """

    name: str
    purpose: str
    missing: str = ""
    origin: str = ""

    @property
    def available(self) -> bool:
        """Whether this machine can use it."""
        return not self.missing


AccelerationReport = Callable[[], tuple[Acceleration, ...]]
"""What a plugin registers."""


def accelerations_of(variant: str, registry: Registry | None = None) -> tuple[Acceleration, ...]:
    """The faster forms of a variant on this machine; none where its plugin registers no report.

    Args:
        variant: the registered name of the report, which is that of the variant.
        registry: where it is looked up; the process's registry by default.

    Raises:
        PluginError: the report cannot be imported, or does not return accelerations.
    """
    from moshi_ttt.core.registry import default_registry

    registry = registry or default_registry()
    if not registry.claims("acceleration", variant.rpartition(":")[2]):
        return ()
    entry = registry.entry("acceleration", variant)
    report = entry.load()
    if not callable(report):
        raise PluginError(
            f"acceleration {variant!r} of {entry.provenance} is a {type(report).__name__}. Register a function that "
            "returns a tuple of Acceleration."
        )
    found = report()
    if not (isinstance(found, tuple) and all(isinstance(each, Acceleration) for each in found)):
        raise PluginError(
            f"acceleration {variant!r} of {entry.provenance} returned {found!r}. It has to return a tuple of "
            "Acceleration."
        )
    return found
