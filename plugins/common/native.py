"""C++ sources of a plugin: prebuilt in the installed package, or built on the machine that runs them.

A wheel may carry prebuilt libraries in ``PREBUILT`` (``scripts/prebuild.py`` makes them; docs/maintainers.md). The name
of a file says what it is for: the library and its sources, torch's minor version, the system, the kind of machine, and
the level of its instructions. A file for anything else is never loaded.

Where there is none, the library is built once and kept in the user's cache folder, named after its sources, its flags,
torch, and the processor. A build appears whole or not at all. One process of a machine builds at a time, and the others
wait for it: the ranks of a training build once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common import instructions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("moshi_ttt.native")

PREBUILT = Path(__file__).with_name("prebuilt")
"""The folder of the libraries that a wheel carries; an ordinary one has none."""
NATIVE = "-march=native"
_UNUSABLE: set[Path] = set()
"""Prebuilt files that this process could not load."""
COMMON = Path(__file__).with_name("cpp")
"""The folder of the headers that several plugins include."""


def common_headers(*names: str) -> tuple[Path, ...]:
    """Headers of ``COMMON``, of these names without ``.h``."""
    return tuple(COMMON / f"{name}.h" for name in names)


@dataclass(frozen=True)
class NativeLibrary:
    """Operations of torch's in C++.

    Attributes:
        name: of the library, and of the namespace in ``torch.ops``.
        what: the start of a sentence that says what it is, for messages.
        source: the file to compile.
        headers: the files that it includes, of its own folder and of ``COMMON``.
        flags: for the compiler, beside what every library gets.
        otherwise: a sentence that says how to go on without it.
    """

    name: str
    what: str
    source: Path
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    otherwise: str = ""

    def load(self) -> None:
        """Load it: prebuilt, from the cache folder, or built now (10 to 40 s).

        A prebuilt one that this system cannot load (built for a newer C library) is named in a warning, and not used.

        Raises:
            BackendError: it cannot be built or kept here.
        """
        if (prebuilt := self.prebuilt()) is not None:
            try:
                torch.ops.load_library(prebuilt)
                return
            except OSError as error:
                _UNUSABLE.add(prebuilt)
                logger.warning("%s is prebuilt and cannot be loaded, so it is not used: %s", self.what, error)
        library = self._kept()
        try:
            if not library.exists():
                library.parent.mkdir(parents=True, exist_ok=True)
                with _alone(library.parent):
                    if not library.exists():  # another process may have built it meanwhile
                        self._build(library, self.flags)
            torch.ops.load_library(library)
        except OSError as error:
            raise BackendError(
                f"{self.what} cannot be built: {error}. It needs a C++ compiler, g++ or the one that CXX names, and a "
                f"folder to keep it, {library.parent} (XDG_CACHE_HOME moves it). {self.otherwise}"
            ) from error

    def prebuilt(self) -> Path | None:
        """The file in ``PREBUILT`` with the most instructions that this processor has; None where there is none.

        A file that this process could not load counts as none.
        """
        files = (PREBUILT / self.prebuilt_name(level) for level in instructions.levels())
        return next((file for file in files if file.is_file() and file not in _UNUSABLE), None)

    def prebuilt_name(self, level: str) -> str:
        """The name of the prebuilt file of one level of instructions, for this torch and this kind of machine."""
        return f"{self.prebuilt_stem()}-{_torch()}-{sys.platform}-{platform.machine()}-{level}.so"

    def prebuilt_stem(self) -> str:
        """The start of the names of all prebuilt files of these sources and flags."""
        return f"{self.name}-{_digest(*self._sources(), *self._portable())}"

    def prebuild(self, level: str, folder: Path = PREBUILT) -> Path:
        """Build the prebuilt file of one level of instructions into ``folder``, and return it.

        Raises:
            BackendError: it cannot be built here.
        """
        library = folder / self.prebuilt_name(level)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._build(library, (*self._portable(), *instructions.compiler_flags(level)))
        except OSError as error:
            raise BackendError(f"{self.what} cannot be built for {level}: {error}.") from error
        return library

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of instructions that a prebuilt file of this kind of machine may have."""
        return instructions.all_levels() if NATIVE in self.flags else (instructions.PLAIN,)

    def origin(self) -> str:
        """Which file serves on this machine, as a sentence; empty where none can. Builds and loads nothing."""
        if (prebuilt := self.prebuilt()) is not None:
            level = next(level for level in instructions.levels() if prebuilt.name == self.prebuilt_name(level))
            return f"Prebuilt for {platform.machine() if level == instructions.PLAIN else level}."
        if self._kept().exists():
            return "Built on this machine."
        return "" if self.missing() else "Built at first use."

    def missing(self) -> str:
        """Why it can be neither loaded nor built on this machine, as a sentence; empty where it can. Builds nothing."""
        library = self._kept()
        if self.prebuilt() is not None or library.exists():
            return ""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"The C++ compiler {compiler} was not found. Install g++, or name another compiler in CXX."
        parent = next(each for each in library.parents if each.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            return f"{parent} is not a folder that can be written. Name another one in XDG_CACHE_HOME."
        return ""

    def why_not(self) -> str | None:
        """``missing`` as the end of a sentence; None where it can be had."""
        return self.missing().rstrip(".") or None

    def version(self) -> str:
        """Another one for each source, set of flags, torch and kind of processor."""
        what = [*self._sources(), *self.flags, torch.__version__, platform.machine()]
        if NATIVE in self.flags:
            what.append(instructions.described())
        return f"{self.name}-{_digest(*what)}"

    def _sources(self) -> list[str]:
        return [path.read_text(encoding="utf-8") for path in (self.source, *self.headers)]

    def _portable(self) -> tuple[str, ...]:
        """The flags without the one for this processor alone."""
        return tuple(flag for flag in self.flags if flag != NATIVE)

    def _kept(self) -> Path:
        """Where a build of this machine is kept."""
        return cache_folder() / self.version() / f"{self.name}.so"

    def _build(self, library: Path, flags: Sequence[str]) -> None:
        """Raises OSError: no compiler, it fails, or the folder cannot be written."""
        torch_folder = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch, library.name)
            command = [
                os.environ.get("CXX", "g++"), "-O3", "-std=c++17", "-shared", "-fPIC", *flags,
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-I{torch_folder / 'include'}", f"-I{self.source.parent}", f"-I{COMMON}",
                str(self.source), "-o", str(built),
                f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if result.returncode != 0:
                lines = result.stderr.strip().splitlines()
                said = next((line for line in lines if "error" in line), "it said nothing")
                raise OSError(f"{command[0]} ended with {result.returncode}: {said}")
            built.replace(library)


def compiled_step(library: NativeLibrary, chosen_by: str) -> Acceleration:
    """The compiled step of ``library``, for a report on faster forms; ``chosen_by`` is the option that chooses it."""
    purpose = f"A streamed step on a CPU, in float32 and float64; chosen by {chosen_by}."
    return Acceleration(name="compiled step", purpose=purpose, missing=library.missing(), origin=library.origin())


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _torch() -> str:
    """What a library's interface to torch depends on: its minor version, and whether it has C++'s older types."""
    minor = ".".join(torch.__version__.split(".")[:2])
    return f"torch{minor}" if torch.compiled_with_cxx11_abi() else f"torch{minor}-before-cxx11"


def cache_folder() -> Path:
    """What is built or measured for this machine, in the user's cache folder; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moshi-ttt"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``. The lock is the operating system's, and goes with the process.

    Where a folder cannot be locked (Windows, some network file systems) each process makes a build of its own.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
