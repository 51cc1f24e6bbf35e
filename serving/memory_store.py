"""A folder of memories and sessions that callers asked to keep.

``FOLDER/OWNER/NAME.safetensors``: OWNER is a hash of the secret id that the owner's client keeps, and NAME a random
128-bit name made here. Nothing that a client sends becomes a path. A file appears whole or not at all; a memory of
somebody else is refused in the same words as one that does not exist.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from safetensors import SafetensorError

from moshi_ttt.core.errors import HostError, MoshiTTTError
from moshi_ttt.hosts.moshi.row_state import RowKind, RowState
from moshi_ttt.serving.precision import Precision, pack, unpack
from moshi_ttt.system.folder_lock import hold

OWNER_ID = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"(memory|session)-[0-9a-f]{32}")
SUFFIX = ".safetensors"
MIB = 2**20
DAY = 24 * 3600.0


class MemoryStoreError(MoshiTTTError, ValueError):
    """What cannot be kept, or is not there, in words for the client."""


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    """How much is kept.

    Attributes:
        per_owner: files of one owner.
        total_bytes: of all owners together.
        max_age_sec: files that are older are removed; None keeps them.
    """

    per_owner: int = 8
    total_bytes: int = 4096 * MIB
    max_age_sec: float | None = 30 * DAY


@dataclass(frozen=True, kw_only=True)
class StoredMemory:
    """One kept file: its ``name``, what it is, ``bytes`` on the disk, and ``saved``, seconds since 1970."""

    name: str
    kind: RowKind
    bytes: int
    saved: float


def new_owner() -> str:
    """A secret id of an owner: who knows it may list, restore and delete what the owner keeps."""
    return secrets.token_hex(16)


class MemoryStore:
    """The files in ``folder``. Methods may be called from several threads; one process has the folder at a time.

    Args:
        precision: how fast weights are written.
        start: the memory of a row that has heard nothing, which ``difference`` subtracts.
    """

    def __init__(
        self,
        folder: Path,
        limits: StoreLimits | None = None,
        *,
        precision: Precision = "exact",
        start: RowState | None = None,
    ) -> None:
        self.folder = folder
        self.limits = limits or StoreLimits()
        self._precision: Precision = precision
        self._start = start
        self._lock = Lock()

    @contextmanager
    def opened(self) -> Iterator[MemoryStore]:
        """Hold the folder, without the half-written files of a process that was killed.

        Raises FolderInUseError, and MemoryStoreError where the folder has something else in it.
        """
        with hold(self.folder):
            for path in self.folder.glob(f"*/.*{SUFFIX}.*.tmp"):
                path.unlink(missing_ok=True)
            self.expire()
            yield self

    def save(self, owner: str, state: RowState) -> tuple[StoredMemory, float]:
        """Keep ``state``. Returns it, and the relative error of what was written: 0 where it is bit-exact.

        Raises MemoryStoreError where a limit is reached, or where the disk does not take it.
        """
        packed, loss = pack(state, self._precision, self._start)
        with _told("take it"):
            return self._save(owner, packed), loss

    def _save(self, owner: str, packed: RowState) -> StoredMemory:
        self.expire()
        with self._lock:
            kept = self._files(owner)
            if len(kept) >= self.limits.per_owner:
                raise MemoryStoreError(
                    f"You keep {len(kept)} of at most {self.limits.per_owner} memories. Delete one of them first."
                )
            used = sum(path.stat().st_size for path in self.folder.glob(f"*/*{SUFFIX}"))
            if used + packed.num_bytes > self.limits.total_bytes:
                raise MemoryStoreError("This server keeps as much as it may. Ask whoever runs it for more room.")
            folder = self._folder(owner)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{packed.kind}-{secrets.token_hex(16)}{SUFFIX}"
            packed.save(path)
            return _described(path)

    def listed(self, owner: str) -> list[StoredMemory]:
        """What an owner keeps, the newest first. Raises MemoryStoreError where the disk does not say."""
        with _told("list it"):
            self.expire()
            with self._lock:
                return sorted((_described(path) for path in self._files(owner)), key=lambda each: -each.saved)

    def load(self, owner: str, name: str) -> RowState:
        """Raises MemoryStoreError where the owner keeps nothing of that name, HostError where the file is damaged."""
        path = self._path(owner, name)
        try:
            state = RowState.load(path)
        except HostError as error:
            raise HostError(str(error).replace(str(path), name)) from None  # a client is not told where it lies
        return unpack(state, self._start)

    def delete(self, owner: str, name: str) -> None:
        """Raises MemoryStoreError where the owner keeps nothing of that name, or the disk does not delete it."""
        with _told("delete it"), self._lock:
            self._path(owner, name).unlink(missing_ok=True)

    def expire(self) -> int:
        """Remove what is too old. Returns how many files that were."""
        if self.limits.max_age_sec is None:
            return 0
        oldest, removed = time.time() - self.limits.max_age_sec, 0
        with self._lock:
            for path in self.folder.glob(f"*/*{SUFFIX}"):
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _folder(self, owner: str) -> Path:
        if not OWNER_ID.fullmatch(owner):
            raise MemoryStoreError("An owner's id is 32 hexadecimal digits.")
        return self.folder / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def _files(self, owner: str) -> list[Path]:
        return [path for path in self._folder(owner).glob(f"*{SUFFIX}") if NAME.fullmatch(path.stem)]

    def _path(self, owner: str, name: str) -> Path:
        # The name is looked up among the owner's, so that nothing a client sends is joined to a path.
        found = [path for path in self._files(owner) if path.stem == name]
        if not found:
            raise MemoryStoreError("You keep no memory of that name.")
        return found[0]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What the disk refuses, as an error in words for the client, without the server's paths."""
    try:
        yield
    except OSError as error:
        raise MemoryStoreError(f"The server's disk did not {what}: {error.strerror}.") from error
    except SafetensorError as error:
        raise MemoryStoreError(f"The server's disk did not {what}: {error}.") from error


def _described(path: Path) -> StoredMemory:
    status = path.stat()
    kind: RowKind = "memory" if path.stem.startswith("memory") else "session"
    return StoredMemory(name=path.stem, kind=kind, bytes=status.st_size, saved=status.st_mtime)
