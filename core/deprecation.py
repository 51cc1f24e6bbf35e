"""Names that moved: the old ones work for one version, with a DeprecationWarning that gives the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


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


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose keyword arguments have new names: ``renamed_arguments(earlier="new")``.

    The function takes an argument under its earlier name with a DeprecationWarning, and raises TypeError where both
    names are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for earlier in names.keys() & kwargs.keys():
                name = names[earlier]
                if name in kwargs:
                    raise TypeError(f"{function.__qualname__}() got {earlier!r} and {name!r}, which are the same.")
                warnings.warn(
                    f"The argument {earlier!r} of {function.__qualname__}() is now {name!r}; the earlier name goes in "
                    "the next version.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[name] = kwargs.pop(earlier)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_attributes(**names: str) -> Callable[[C], C]:
    """Decorate a class whose attributes have new names: ``renamed_attributes(earlier="new")``.

    An attribute can be read under its earlier name, with a DeprecationWarning; of a dataclass, its constructor takes
    the earlier name as well.
    """

    def decorate(owner: C) -> C:
        for earlier, name in names.items():
            setattr(owner, earlier, _renamed_attribute(owner, earlier, name))
        type.__setattr__(owner, "__init__", renamed_arguments(**names)(vars(owner)["__init__"]))
        return owner

    return decorate


def renamed(earlier: str, name: str, *, of: type) -> None:
    """Warn that the attribute or method ``earlier`` of a class is now ``name``, at the line that uses it."""
    warnings.warn(
        f"{of.__qualname__}.{earlier} is now {of.__qualname__}.{name}; the earlier name goes in the next version.",
        DeprecationWarning,
        stacklevel=3,
    )


def _renamed_attribute(owner: type, earlier: str, name: str) -> property:
    def read(instance: Any) -> Any:
        renamed(earlier, name, of=owner)
        return getattr(instance, name)

    return property(read)
