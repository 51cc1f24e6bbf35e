"""Output folders: written completely or not at all, and never in place of files of others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import MoshiTTTError

METRICS = "metrics.json"
"""The figures of a result."""
MARKER = ".made_by.json"
"""Which command made a folder, and every file that it put there."""

LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""Files that file managers leave in every folder that a person looks at."""


class OutputError(MoshiTTTError, ValueError):
    """An output folder that cannot, or must not, be written."""


def check_free(folder: Path, *, made_by: str, overwrite: bool) -> None:
    """Raise OutputError unless ``folder`` is new, empty, or (with ``overwrite``) an earlier result of ``made_by``.

    An earlier result holds what that command put there and nothing else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} exists and is not a folder. Choose another with --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    marker = _read_marker(folder)
    ours = marker.get("made_by") == made_by
    if overwrite and not ours:
        raise OutputError(
            f"{folder} is not empty and was not made by `{made_by}` (no {MARKER} in it says so), so --overwrite does "
            "not replace it. Choose another folder with --out, or empty it yourself."
        )
    if overwrite and (others := sorted(_files(folder) - {*marker.get("files", []), MARKER})):
        named = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise OutputError(
            f"{folder} holds {named}, which `{made_by}` did not put there and --overwrite would delete. "
            "Move that away, or choose another folder with --out."
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
        marker = {"made_by": made_by, "files": sorted(_files(temporary))}
        (temporary / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        check_free(folder, made_by=made_by, overwrite=overwrite)  # it took minutes: someone may have written there
        done = True


def remove_empty(folders: list[Path]) -> None:
    """Remove the parent folders that were created and are empty, innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _files(folder: Path) -> set[str]:
    """Every file in ``folder``, and every link and empty folder, by its path from there."""
    found = set()
    for path in folder.rglob("*"):
        if path.name in LITTER:
            continue
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            found.add(path.relative_to(folder).as_posix())
    return found


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}
