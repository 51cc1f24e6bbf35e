"""A lock that admits one process at a time to a folder. The operating system releases it when the process ends.

The file ``run.lock`` in the folder is locked (POSIX record locks, which NFS passes on to its server; a byte of it on
Windows), and says who holds it. Where a file system cannot lock, the file's being there is the lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.output_folder import remove_empty

LOCK = "run.lock"
_TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
_BEYOND = 2**30
"""The byte that is locked on Windows: a locked byte cannot be read, and the file's text should be."""


class FolderInUseError(MoshiTTTError, RuntimeError):
    """Another process works in a folder."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold ``folder`` while the context lasts. It is made where it is missing, and removed if it stays empty.

    The lock keeps other processes out, not other threads of this one.

    Raises FolderInUseError, which names the process that holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder / LOCK)
        try:
            yield
        finally:
            _release(folder / LOCK, descriptor)
    finally:
        remove_empty(made)


def _acquire(path: Path) -> int:
    """A descriptor of the locked file. The lock goes when it is closed, and when this process ends."""
    while True:
        try:
            descriptor, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                descriptor, new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:
                continue  # its holder has just removed it
        try:
            found = _lock(descriptor)
            if found == "taken":
                raise FolderInUseError(_held(path))
            if found == "impossible" and not new and not _was_left(path):
                raise FolderInUseError(
                    f"{_held(path)} This file system cannot lock, so it may be left from a process that was killed: "
                    f"if that one does not run any more, delete {path}."
                )
            if _is_still(path, descriptor):
                _describe(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that its holder removed before it was locked here


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if sys.platform != "win32" and _is_still(path, descriptor):
            path.unlink()  # while it is locked, so that it is nobody else's
    os.close(descriptor)
    if sys.platform == "win32":
        with suppress(OSError):
            path.unlink()  # refused while another process has it open


def _lock(descriptor: int) -> Literal["held", "taken", "impossible"]:
    """Try to lock an open file; "impossible" where its file system, or this Python, has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _BEYOND, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:
        return "impossible"
    except OSError as error:
        return "taken" if error.errno in _TAKEN else "impossible"
    return "held"


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _describe(descriptor: int) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(path: Path) -> str:
    holder = _holder(path)
    who = "process {pid} on {host}, since {since}".format_map({"pid": "?", "host": "?", "since": "?", **holder})
    return (
        f"{path.parent} is in use by another run ({who}). Wait until it has ended, or stop it with `kill "
        f"{holder.get('pid', 'PID')}` there, which saves first; or choose another folder."
    )


def _was_left(path: Path) -> bool:
    """Whether a lock that is a file alone was left by a process of this host that does not run any more."""
    holder = _holder(path)
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
