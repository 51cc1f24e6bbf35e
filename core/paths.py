"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from moshi_ttt.core.errors import ConfigError


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path, in which a leading ``~`` is the user's home folder and ``~name`` that of another.

    Raises ConfigError when there is no such home, or ``text`` is no path.
    """
    if not isinstance(text, str | os.PathLike):
        raise ConfigError(
            f"Expected the path of a file or folder, got {type(text).__name__}. Check the order of the arguments."
        )
    given = os.fspath(text)
    path = os.path.expanduser(given)  # of the text: to pathlib ./~ and ~ are the same
    if given.startswith("~") and path.startswith("~"):
        raise ConfigError(
            f"{given}: there is no home folder to put in place of its ~. Write ./{given} for a folder of that name, or "
            "the whole path."
        )
    return Path(path)
