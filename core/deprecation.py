"""Names that moved: the old ones work for one version, with a DeprecationWarning that gives the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def moved_names(module: str, new: str | None, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names have moved.

    Args:
        module: the module's own name, under which the names were found before.
        new: the module that has them now; None where only those in ``renamed`` have moved.
        renamed: earlier name -> the name in ``new``, or ``"other.module:name"``.

    Returns:
        A function from a name to the object. It raises AttributeError for a name that never was.
    """
    renamed = renamed or {}

    def find(name: str) -> Any:
        place, _, attribute = renamed.get(name, name).rpartition(":")
        place = place or new or ""
        if name.startswith("__") or not place:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        try:
            found = getattr(import_module(place), attribute)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; its names are in {place}") from None
        warnings.warn(
            f"{module}.{name} is now {place}.{attribute}; the earlier name goes in the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find
