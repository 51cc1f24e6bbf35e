"""C++ sources of a plugin, built on the machine that runs them and kept in the user's cache folder.

A library's folder is named after its sources, its flags, torch, and the processor. A build appears whole or not at all.
One process of a machine builds at a time, and the others wait for it: the ranks of a training build once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.core.errors import BackendError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class NativeLibrary:
    """Operations of torch's in C++.

    Attributes:
        name: of the library, and of the namespace in ``torch.ops``.
        what: the start of a sentence that says what it is, for messages.
        source: the file to compile. headers: files it includes, from its own folder.
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
        """Load it, from the cache folder or built now (10 to 40 s).

        Raises:
            BackendError: it cannot be built or kept here.
        """
        library = cache_folder() / self.version() / f"{self.name}.so"
        try:
            if not library.exists():
                library.parent.mkdir(parents=True, exist_ok=True)
                with _alone(library.parent):
                    if not library.exists():  # another process may have built it meanwhile
                        self._build(library)
            torch.ops.load_library(library)
        except OSError as error:
            raise BackendError(
                f"{self.what} cannot be built: {error}. It needs a C++ compiler, g++ or the one that CXX names, and a "
                f"folder to keep it, {library.parent} (XDG_CACHE_HOME moves it). {self.otherwise}"
            ) from error

    def missing(self) -> str:
        """Why it can be neither loaded nor built on this machine, as a sentence; empty where it can. Builds nothing."""
        folder = cache_folder() / self.version()
        if (folder / f"{self.name}.so").exists():
            return ""
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"The C++ compiler {compiler} was not found. Install g++, or name another compiler in CXX."
        parent = next(each for each in folder.parents if each.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            return f"{parent} is not a folder that can be written. Name another one in XDG_CACHE_HOME."
        return ""

    def version(self) -> str:
        """Another one for each source, set of flags, torch and kind of processor."""
        sources = [path.read_text(encoding="utf-8") for path in (self.source, *self.headers)]
        what = [*sources, *self.flags, torch.__version__, platform.machine()]
        if "-march=native" in self.flags:
            what.append(_instructions())
        return f"{self.name}-{hashlib.sha256(' '.join(what).encode()).hexdigest()[:16]}"

    def _build(self, library: Path) -> None:
        """Raises OSError: no compiler, it fails, or the folder cannot be written."""
        torch_folder = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch, library.name)
            command = [
                os.environ.get("CXX", "g++"), "-O3", "-std=c++17", "-shared", "-fPIC", *self.flags,
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-I{torch_folder / 'include'}", f"-I{self.source.parent}", str(self.source), "-o", str(built),
                f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if result.returncode != 0:
                lines = result.stderr.strip().splitlines()
                said = next((line for line in lines if "error" in line), "it said nothing")
                raise OSError(f"{command[0]} ended with {result.returncode}: {said}")
            built.replace(library)


def compiled_step(library: NativeLibrary, chosen_by: str = "compile_step") -> Acceleration:
    """The compiled step of ``library``, for a report on faster forms; ``chosen_by`` is the option that chooses it."""
    purpose = f"A streamed step on a CPU, in float32 and float64; chosen by {chosen_by}."
    return Acceleration(name="compiled step", purpose=purpose, missing=library.missing())


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


def _instructions() -> str:
    """What tells processors apart whose instructions differ: a home folder may be shared by several."""
    if CPUINFO.exists():
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.processor()
