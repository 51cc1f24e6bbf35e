"""Folders that appear whole or not at all, and that never replace what they did not make."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import MoshiTTTError

METRICS = "metrics.json"
"""The file that tells who made a folder, under the key ``made_by``."""


class OutputError(MoshiTTTError, ValueError):
    """A place where nothing can, or may, be written."""


def check_free(folder: Path, *, made_by: str, overwrite: bool) -> None:
    """Raise OutputError unless ``folder`` is new, empty, or (with ``overwrite``) an earlier result of ``made_by``."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} exists and is not a folder. Choose another with --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = _maker(folder) == made_by
    if overwrite and not ours:
        raise OutputError(
            f"{folder} is not empty and was not made by `{made_by}`, so --overwrite does not replace it. "
            "Choose another folder with --out, or empty it yourself."
        )
    if not overwrite:
        way = "add --overwrite to replace it" if ours else "empty it yourself"
        raise OutputError(f"{folder} exists and is not empty. Choose another folder with --out, or {way}.")


@contextmanager
def new_folder(folder: Path, *, made_by: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the context ends well, and else disappears.

    Raises OutputError as ``check_free``, or when nothing can be written there.
    """
    check_free(folder, made_by=made_by, overwrite=overwrite)
    folder = Path(os.path.abspath(folder))
    created = [parent for parent in folder.parents if not parent.exists()]
    done = False
    with ExitStack() as stack:
        stack.callback(lambda: None if done else remove_empty(created))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(atomic_folder(folder))
        except OSError as error:
            raise OutputError(f"Cannot write {folder}: {error.strerror}. Choose another folder with --out.") from None
        yield temporary
        check_free(folder, made_by=made_by, overwrite=overwrite)  # it took minutes: someone may have written there
        done = True


def remove_empty(folders: list[Path]) -> None:
    """Remove the parents that were made for nothing, innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _maker(folder: Path) -> str | None:
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics.get("made_by") if isinstance(metrics, dict) else None
