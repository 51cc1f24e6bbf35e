"""Names that moved: the earlier ones work for one version, with a DeprecationWarning that says the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def moved_names(module: str, new: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names have moved.

    Args:
        module: the module's own name, under which the names were found before.
        new: the module that has them now.
        renamed: earlier name -> the name in ``new``, or ``"other.module:name"``; other names are unchanged.

    Returns:
        A function from a name to the object. It raises AttributeError for a name that the new module lacks too.
    """
    renamed = renamed or {}

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, attribute = renamed.get(name, name).rpartition(":")
        place = place or new
        try:
            found = getattr(import_module(place), attribute)
        except AttributeError:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; its names are in {new}") from None
        warnings.warn(
            f"{module}.{name} is now {place}.{attribute}; the earlier name goes in the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find


def moved_modules(package: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package some of whose modules have moved.

    Args:
        package: the package's own name.
        moved: earlier module, relative to the package -> the full name of the module that replaces it.
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(
            f"{package}.{name} is now {moved[name]}; the earlier name goes in the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return import_module(moved[name])

    return find
