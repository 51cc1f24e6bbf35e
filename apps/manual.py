"""The end of a command's ``--help``: its examples and its exit codes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from typer import Typer
from typer.core import TyperCommand, TyperGroup

USAGE_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Manual:
    """What ``--help`` of a command says beside its options.

    Attributes:
        examples: a command line -> what it does, as a sentence.
        exit_codes: exit code -> what it means, as a sentence.
    """

    examples: Mapping[str, str]
    exit_codes: Mapping[int, str]

    def lines(self) -> list[str]:
        """The text below the options."""
        return [
            "Examples:",
            *(line for command, meaning in self.examples.items() for line in (f"  $ {command}", f"      {meaning}")),
            "",
            "Exit codes:",
            *(f"  {code:<4} {meaning}" for code, meaning in sorted(self.exit_codes.items())),
        ]


def manual(*, examples: Mapping[str, str], exit_codes: Mapping[int, str]) -> Manual:
    """A manual with the exit codes that every command has. A command may say more about one of these."""
    shared = {
        0: "Done.",
        USAGE_ERROR: "An option, a config or a file cannot be used; the message says why.",
        INTERRUPTED: "Interrupted by Ctrl-C or a termination signal.",
    }
    return Manual(examples=examples, exit_codes=shared | dict(exit_codes))


def command_with(text: Manual) -> type[TyperCommand]:
    """The class of a command whose ``--help`` ends with a manual."""

    class DocumentedCommand(TyperCommand):
        manual = text

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _show(text)

    return DocumentedCommand


def group_with(text: Manual, base: type[TyperGroup] = TyperGroup) -> type[TyperGroup]:
    """The class of a group of commands whose ``--help`` ends with a manual."""

    class DocumentedGroup(base):  # type: ignore[misc, valid-type]
        manual = text

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _show(text)

    return DocumentedGroup


def documented(app: Typer, name: str, text: Manual) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to ``app`` as the command ``name``, with its docstring and a manual as the help."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        return app.command(name, cls=command_with(text), help=flowing(function.__doc__ or ""))(function)

    return add


def flowing(docstring: str) -> str:
    """A docstring with a line for each paragraph: a terminal breaks lines by its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


def _show(text: Manual) -> None:
    from typer import echo

    echo("\n".join(f" {line}".rstrip() for line in text.lines()) + "\n")
