"""What all commands share: the console, the handling of errors and interruptions, and the exit codes."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.interruption import Interruption, handle, stop_signals
from moshi_ttt.system.threads import prepare_environment

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
COMPLETION_VARIABLE = "_MOSHI_TTT_COMPLETE"
"""The variable with which a completion script asks this program for completions."""

interruption = Interruption()
"""What a signal does in a process of the command line, until a training takes it over."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the package's errors, system errors and interruptions into a message and an exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            errors().print("\n[bold]Interrupted.[/] Nothing half-written was left behind.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if not isinstance(error, (MoshiTTTError, OSError)):
            raise
        end = "." if isinstance(error, OSError) else ""
        errors().print(f"[bold red]Error:[/] {_plain(error)}{end}", highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from None


class Commands(TyperGroup):
    """The group of all commands, which turns errors into messages instead of tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors():
            return super().invoke(ctx)


class Command(TyperCommand):
    """One command as a program of its own, which turns errors into messages like ``Commands``."""

    def invoke(self, ctx: Any) -> Any:
        with user_errors():
            return super().invoke(ctx)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether ``error`` is an interruption, or was raised by code that met one and made another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def console() -> Console:
    from rich.console import Console

    # A pipe or a log has no width of its own; 80 columns would cut the tables.
    return Console(width=None if sys.stdout.isatty() else 110)


def errors() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    print(f"Warning: {message}", file=file or sys.stderr)


def run(app: typer.Typer) -> None:
    """Run a command line in this process, and end it."""
    prepare_environment(os.environ)  # before anything imports torch or NumPy
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter shows a question mark for it
            stream.reconfigure(errors="replace")
    if COMPLETION_VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()  # the answers that the scripts of `moshi-ttt completion` read
    command = typer.main.get_command(app)  # until now a signal ends the process by itself
    # A termination is an interruption: what is half-written is cleared away on the way out.
    handle(stop_signals(), interruption)
    try:
        command(complete_var=COMPLETION_VARIABLE)
    finally:
        # The exit code is decided. Another signal of the stop that ended this would replace it.
        handle(stop_signals(), signal.SIG_IGN)
