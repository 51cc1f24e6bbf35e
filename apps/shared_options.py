"""Options that several commands share, written once as the fields of a dataclass.

    @dataclass(frozen=True, kw_only=True)
    class Shared:
        out: Annotated[Path, typer.Option("--out")]

    @app.command()
    @with_shared_options
    def command(shared: Shared, seed: int = 0) -> None: ...

The command has the options ``--out`` and ``--seed``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from typing import Any, TypeVar, get_type_hints

import typer

from moshi_ttt.core.errors import ConfigError

Value = TypeVar("Value")


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command for typer, with the fields of each dataclass among its parameters in place of that parameter."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[Parameter] = []
    for name, own in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _fields_of(groups[name])
        else:
            parameters.append(own.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
    belongs = {each.name: name for name, group in groups.items() for each in fields(group)}

    @wraps(command)
    def gathered(**given: Any) -> None:
        shared: dict[str, dict[str, Any]] = {name: {} for name in groups}
        for name in [name for name in given if name in belongs]:
            shared[belongs[name]][name] = given.pop(name)
        command(**{name: groups[name](**values) for name, values in shared.items()}, **given)

    gathered.__dict__["__signature__"] = inspect.Signature(parameters)
    gathered.__annotations__ = {each.name: each.annotation for each in parameters}
    return gathered


def renamed_option(earlier: str, earlier_value: Value | None, name: str, value: Value | None) -> Value | None:
    """The value of an option under its name or, with a warning, under its earlier one. Raises ConfigError for both."""
    if earlier_value is None:
        return value
    if value is not None:
        raise ConfigError(f"{name} and {earlier} are the same option. Give {name} alone.")
    typer.echo(f"Warning: {earlier} is now {name}; the earlier name goes in the next version.", err=True)
    return earlier_value


def _fields_of(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            each.name, Parameter.KEYWORD_ONLY, annotation=hints[each.name],
            default=Parameter.empty if each.default is MISSING else each.default,
        )
        for each in fields(group)
    ]  # fmt: skip
