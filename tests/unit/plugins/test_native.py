"""Libraries in C++: several processes that need one build it once."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common import native
from moshi_ttt.plugins.common.native import NativeLibrary
from moshi_ttt.plugins.gating_mlp import compiled as gating_mlp
from moshi_ttt.plugins.hybrid import compiled as hybrid
from moshi_ttt.plugins.hybrid.cpp import chunk
from moshi_ttt.plugins.ttt_ridge import compiled as ttt_ridge
from tests.ranks import launch

SOURCE = 'extern "C" int nothing() { return 0; }\n'
PROGRAM = """
import os, sys
from pathlib import Path
from moshi_ttt.plugins.common.native import NativeLibrary
folder = Path(sys.argv[1])
os.environ.update(XDG_CACHE_HOME=str(folder), CXX=str(folder / "compiler"))
(folder / f"ready{os.environ['RANK']}").touch()
while not all((folder / f"ready{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
    pass
NativeLibrary(name="nothing", what="Nothing", source=folder / "nothing.cpp").load()
"""
COMPILER = """#!/bin/sh
echo "$$" >> "{folder}/called"
exec "{compiler}" "$@"
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "nothing.cpp").write_text(SOURCE)
    (tmp_path / "compiler").write_text(COMPILER.format(folder=tmp_path, compiler=shutil.which("g++")))
    (tmp_path / "compiler").chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@needs_compiler
@pytest.mark.skipif(native.fcntl is None, reason="folders cannot be locked here")
def test_processes_that_build_at_once_build_once(folder):
    launch(folder / "program.py", folder, ranks=3, timeout=60)
    assert len((folder / "called").read_text().splitlines()) == 1
    assert [path.name for path in (folder / "moshi-ttt").rglob("*.so")] == ["nothing.so"]


@needs_compiler
def test_a_lock_is_not_left_behind_by_a_build_that_fails(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    library = NativeLibrary(name="nothing", what="Nothing", source=folder / "nothing.cpp", otherwise="Go on without.")
    (folder / "nothing.cpp").write_text("this is no C++")
    with pytest.raises(BackendError, match=r"Nothing cannot be built.*Go on without\."):
        library.load()
    (folder / "nothing.cpp").write_text(SOURCE)
    library.load()
    assert library.missing() == ""


LIBRARIES = (gating_mlp.LIBRARY, hybrid.LIBRARY, chunk.LIBRARY, ttt_ridge.LIBRARY)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_every_header_is_part_of_the_version(library):
    """A change of one that is not would not be built."""
    by_name = {path.name: path for path in library.headers}
    assert len(by_name) == len(library.headers)
    included, left = set(), [library.source]
    while left:
        for name in re.findall(r'#include "(?:.*/)?([^"]+)"', left.pop().read_text(encoding="utf-8")):
            if name not in included:
                included.add(name)
                left.append(by_name[name])
    assert included == set(by_name)
    before = library.version()
    assert all(replace(library, headers=library.headers[:i] + library.headers[i + 1 :]).version() != before
               for i in range(len(library.headers)))  # fmt: skip


def test_every_common_header_is_of_a_library():
    listed = {path for library in LIBRARIES for path in library.headers if path.parent == native.COMMON}
    assert listed == set(native.COMMON.glob("*.h"))
