"""Command-line arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.paths import user_path


def _path(text: Any) -> Path:
    """A path in which ``~`` is the user's home: a shell does not replace it in ``--out=~/run`` or in quotes."""
    try:
        return user_path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


class _PathOptions(TypedDict):
    parser: Any
    metavar: str


PATH: _PathOptions = {"parser": _path, "metavar": "PATH"}
"""What an option or argument that is a path is declared with."""
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of CPU threads. Default: one for a small model, else all cores."),
]
