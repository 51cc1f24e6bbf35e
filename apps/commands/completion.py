"""``moshi-ttt completion``: print the script that lets a shell complete command lines."""

from __future__ import annotations

from typing import Annotated

import typer

from moshi_ttt.apps.console import COMPLETION_VARIABLE
from moshi_ttt.core.errors import ConfigError, nearest

SHELLS = ("bash", "zsh", "fish")


def completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")]) -> None:
    """Print a script that lets a shell complete commands and options.

    Nothing is installed or changed: evaluate the script, or write it to a file that the shell reads.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    if shell not in SHELLS:
        raise ConfigError(f"There is no completion for the shell {shell!r}. {nearest(shell, SHELLS)}")
    typer.echo(get_completion_script(prog_name="moshi-ttt", complete_var=COMPLETION_VARIABLE, shell=shell))
