"""Atomic writes to disk: a reader finds the old contents or the new ones, and a failure leaves the old ones."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces ``folder`` if the context ends without an error, and is removed otherwise.

    Everything in it is synced first. The parent of ``folder`` must exist.
    """
    temporary = _new_name(folder)
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder, which lies beside ``folder``, to ``folder``, replacing an existing one.

    Everything in it is synced first: the name never means half of it, whatever fails.
    """
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    _take_place(temporary, folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``; renamed to ``path`` if the context ends without an error, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _take_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(temporary, folder)
        _sync(folder.parent)
        return
    # A folder cannot be renamed over another: the old one steps aside, and back if the new one does not arrive.
    aside = _new_name(folder)
    try:
        aside.mkdir()
        os.rename(folder, aside / folder.name)
        try:
            os.rename(temporary, folder)
        except BaseException:
            os.rename(aside / folder.name, folder)
            raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk hold a file's contents, or a folder's names."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return  # Windows opens no folder, and writes the names in it by its own journal
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # Windows syncs only what may be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_name(folder: Path) -> Path:
    """A hidden name beside ``folder`` that nothing has. The name comes before what is made under it, so that an
    interruption at any moment finds it, and clears it away.
    """
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
