#!/usr/bin/env python3
"""Compiles the C++ libraries into plugins/common/prebuilt, so that a wheel that is built next carries them.

    python scripts/prebuild.py                      # for every level of instructions of this kind of machine
    python scripts/prebuild.py --levels x86-64-v3

They are for the installed torch's minor version and for this system; run it once in an environment of each version
that the wheel is to serve. Files of other sources are removed. ``--remove`` removes all: a wheel without them is the
ordinary one. docs/maintainers.md says how to build the wheel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common import instructions
from moshi_ttt.plugins.common.native import PREBUILT, NativeLibrary
from moshi_ttt.plugins.gating_mlp.compiled import LIBRARY as IN_PLACE_STEP
from moshi_ttt.plugins.hybrid.compiled import LIBRARY as HYBRID_STEP
from moshi_ttt.plugins.hybrid.cpp.chunk import LIBRARY as HYBRID_CHUNK
from moshi_ttt.plugins.ttt_ridge.compiled import LIBRARY as RIDGE_STEP

LIBRARIES = (HYBRID_CHUNK, HYBRID_STEP, IN_PLACE_STEP, RIDGE_STEP)
"""All libraries of the package."""


def prebuild(libraries: Sequence[NativeLibrary], levels: Sequence[str], folder: Path = PREBUILT) -> list[Path]:
    """Build each library for each level (``levels_of``); the files. Raises BackendError where one cannot be built."""
    return [library.prebuild(level, folder) for library in libraries for level in levels_of(library, levels)]


def levels_of(library: NativeLibrary, levels: Sequence[str]) -> list[str]:
    """Those of ``levels`` that the library has; where it has none of them, the plain one, which it always has."""
    return [level for level in levels if level in library.levels] or [instructions.PLAIN]


def outdated(libraries: Sequence[NativeLibrary], folder: Path = PREBUILT) -> list[Path]:
    """Files in ``folder`` that are of other sources than these."""
    stems = tuple(f"{library.prebuilt_stem()}-" for library in libraries)
    return [path for path in sorted(folder.glob("*.so")) if not path.name.startswith(stems)]


def main(given: Sequence[str] | None = None) -> None:
    known = instructions.all_levels()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--levels", nargs="+", choices=known, default=known, help=f"default: {' '.join(known)}")
    what.add_argument("--remove", action="store_true", help="remove what was built, and build nothing")
    options = parser.parse_args(given)
    for path in sorted(PREBUILT.glob("*.so")) if options.remove else outdated(LIBRARIES):
        path.unlink()
        print(f"removed {path.name}")
    if options.remove:
        return
    try:
        built = prebuild(LIBRARIES, options.levels)
    except BackendError as error:
        sys.exit(str(error))
    for path in built:
        print(f"{path.stat().st_size / 1e6:.2f} MB  {path.name}")


if __name__ == "__main__":
    main()
