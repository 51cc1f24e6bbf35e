"""Folders that appear whole or not at all, and that never replace what they did not make."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        _remove_empty(created)
        raise OutputError(f"Cannot write {folder}: {error.strerror}. Choose another folder with --out.") from None
    done = False
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner alone
        check_free(folder, made_by=made_by, overwrite=overwrite)  # it took minutes: someone may have written there
        _take_place(temporary, folder)
        done = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            _remove_empty(created)


def _take_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(temporary, folder)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.rename(folder, retired / folder.name)
        try:
            os.rename(temporary, folder)
        except OSError:
            os.rename(retired / folder.name, folder)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
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
