"""Prebuilt libraries: which file is taken on which machine, and that it computes what a local build does."""

from __future__ import annotations

import ast
import importlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moshi_ttt.core.errors import BackendError
from moshi_ttt.plugins.common import instructions, native
from moshi_ttt.plugins.common.block_backends import LEAST_STATE, StepUse
from moshi_ttt.plugins.common.native import NATIVE, NativeLibrary
from moshi_ttt.plugins.gating_mlp import backends as gating_backends
from moshi_ttt.plugins.gating_mlp.compiled import LIBRARY as IN_PLACE
from moshi_ttt.plugins.hybrid.backends import STEP, TRAIN, HybridUse
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.cpp.chunk import LIBRARY as CHUNK
from moshi_ttt.plugins.ttt_ridge import backends as ridge_backends
from moshi_ttt.plugins.ttt_ridge.compiled import LIBRARY as RIDGE
from tests.programs import load_script
from tests.project import ROOT, package_folders

SOURCE = 'extern "C" int nothing() { return 0; }\n'
V3, V4 = (instructions.LEVELS["x86_64"][level] for level in ("x86-64-v3", "x86-64-v4"))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


def processor(monkeypatch, folder: Path, flags: frozenset[str] | None, machine: str = "x86_64") -> None:
    """A machine whose /proc/cpuinfo lists these; None: it has no such file."""
    path = folder / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(sorted(flags))}\nmodel name\t: Some CPU\n")
    monkeypatch.setattr(instructions, "CPUINFO", path)
    monkeypatch.setattr(instructions.platform, "machine", lambda: machine)


@pytest.fixture
def library(tmp_path, monkeypatch) -> NativeLibrary:
    """One that is neither built nor prebuilt, in an empty folder of prebuilt files and an empty cache."""
    (tmp_path / "nothing.cpp").write_text(SOURCE)
    (tmp_path / "prebuilt").mkdir()
    monkeypatch.setattr(native, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return NativeLibrary(
        name="nothing", what="Nothing", source=tmp_path / "nothing.cpp", flags=(NATIVE, "-ffp-contract=fast")
    )


# ---- which file


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (V4, ("x86-64-v4", "x86-64-v3", "plain")),
        (V3, ("x86-64-v3", "plain")),
        (V4 - {"avx512vl"}, ("x86-64-v3", "plain")),
        (V4 - {"avx2"}, ("plain",)),
        (frozenset(), ("plain",)),
        (None, ("plain",)),
    ],
)
def test_levels_are_those_whose_every_instruction_is_there(monkeypatch, tmp_path, flags, expected):
    processor(monkeypatch, tmp_path, flags)
    assert instructions.levels() == expected
    assert instructions.all_levels() == ("x86-64-v4", "x86-64-v3", "plain")


def test_other_kinds_of_machines_have_the_plain_level(monkeypatch, tmp_path):
    processor(monkeypatch, tmp_path, V4, "aarch64")
    assert instructions.levels() == instructions.all_levels() == ("plain",)


def test_the_richest_file_that_the_processor_can_run_is_taken(monkeypatch, tmp_path, library):
    processor(monkeypatch, tmp_path, V4)
    files = {level: native.PREBUILT / library.prebuilt_name(level) for level in instructions.all_levels()}
    assert len(set(files.values())) == 3
    assert library.prebuilt() is None
    for level in ("plain", "x86-64-v3", "x86-64-v4"):
        files[level].touch()
        assert library.prebuilt() == files[level]
    processor(monkeypatch, tmp_path, V3)
    assert library.prebuilt() == files["x86-64-v3"]
    files["x86-64-v3"].unlink()
    files["plain"].unlink()
    assert library.prebuilt() is None, "this processor cannot run x86-64-v4"


@pytest.mark.parametrize("what", ["torch", "abi", "machine", "system", "source", "flags", "name"])
def test_a_file_for_anything_else_is_not_taken(monkeypatch, tmp_path, library, what):
    processor(monkeypatch, tmp_path, V3)
    file = native.PREBUILT / library.prebuilt_name("plain")
    file.touch()
    assert library.prebuilt() == file
    other = library
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "1.0.0")
    elif what == "abi":
        now = torch.compiled_with_cxx11_abi()
        monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: not now)
    elif what == "machine":
        processor(monkeypatch, tmp_path, V3, "aarch64")
    elif what == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif what == "source":
        library.source.write_text(SOURCE + "// changed\n")
    else:
        changed = {"name": "other"} if what == "name" else {"flags": (NATIVE,)}
        other = NativeLibrary(**{**vars(library), **changed})
    assert other.prebuilt() is None


def test_another_patch_of_torch_is_the_same_minor_version(monkeypatch, library):
    monkeypatch.setattr(torch, "__version__", "2.9.0+cpu")
    name = library.prebuilt_name("plain")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert library.prebuilt_name("plain") == name
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    assert library.prebuilt_name("plain") != name


# ---- what is said


def test_where_the_library_comes_from_is_said(monkeypatch, tmp_path, library):
    processor(monkeypatch, tmp_path, V3)
    monkeypatch.setenv("CXX", sys.executable)
    assert library.origin() == "Built at first use."
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert library.origin() == ""
    assert "was not found" in library.missing()
    kept = tmp_path / "cache" / "moshi-ttt" / library.version() / "nothing.so"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert (library.origin(), library.missing()) == ("Built on this machine.", "")
    (native.PREBUILT / library.prebuilt_name("plain")).touch()
    assert (library.origin(), library.missing()) == ("Prebuilt for x86_64.", "")
    (native.PREBUILT / library.prebuilt_name("x86-64-v3")).touch()
    assert library.origin() == "Prebuilt for x86-64-v3."


def test_info_says_it(monkeypatch, tmp_path):
    from moshi_ttt.core.accelerations import accelerations_of

    monkeypatch.setattr(native, "PREBUILT", tmp_path)
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / CHUNK.prebuilt_name("plain")).touch()
    forms = {each.name: each for each in accelerations_of("ttt_mlp")}
    assert forms["compiled training"].origin == f"Prebuilt for {instructions.platform.machine()}."
    assert "Prebuilt" not in forms["compiled step"].origin


# ---- what it is used for


def test_auto_takes_what_is_prebuilt_for_heads_of_every_width(monkeypatch, tmp_path):
    """What is prebuilt needs no build, which would take longer than a small model's training."""
    monkeypatch.setattr(native, "PREBUILT", tmp_path)
    use = HybridUse(HybridConfig(variant="ttt_linear", base_lr=1.0), (16, 16), torch.device("cpu"), torch.float32)

    def passed_by(operation) -> str | None:
        return next(each for each in operation.backends if each.name == "cpp").why_not_auto(use)

    assert "C++ is built for heads of 128 or more" in passed_by(TRAIN)
    (tmp_path / CHUNK.prebuilt_name("plain")).touch()
    assert passed_by(TRAIN) is None
    assert passed_by(STEP) is not None, "the step is another library"


@pytest.mark.parametrize(
    ("operation", "of"),
    [(ridge_backends.STEP, RIDGE), (gating_backends.STEP, IN_PLACE)],
    ids=["ttt_ridge", "gating_mlp"],
)
def test_auto_takes_a_prebuilt_step_for_states_of_every_size(monkeypatch, tmp_path, operation, of):
    monkeypatch.setattr(native, "PREBUILT", tmp_path)
    (cpp,) = (each for each in operation.backends if each.name == "cpp")
    small = StepUse(torch.device("cpu"), torch.float32, 100)
    assert "its state has 100 numbers for each stream" in cpp.why_not_auto(small)
    assert cpp.why_not_auto(StepUse(torch.device("cpu"), torch.float32, LEAST_STATE)) is None
    (tmp_path / of.prebuilt_name("plain")).touch()
    assert cpp.why_not_auto(small) is None


@needs_compiler
def test_one_that_cannot_be_loaded_is_built_here_and_named(library, caplog):
    (native.PREBUILT / library.prebuilt_name("plain")).write_bytes(b"no library")
    with caplog.at_level(logging.WARNING, logger="moshi_ttt.native"):
        library.load()
    assert "Nothing is prebuilt and cannot be loaded, so it is not used" in caplog.text
    assert library.prebuilt() is None, "what cannot be loaded counts as none"
    assert library.origin() == "Built on this machine."
    assert list(native.cache_folder().rglob("nothing.so")) != []


@needs_compiler
def test_a_prebuilt_one_needs_no_compiler_and_no_cache(monkeypatch, library):
    file = library.prebuild("plain", native.PREBUILT)
    assert file == library.prebuilt()
    monkeypatch.setenv("CXX", "/no/compiler")
    library.load()
    assert not native.cache_folder().exists()


def test_a_prebuild_that_fails_says_for_what(monkeypatch, library):
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(BackendError, match="Nothing cannot be built for x86-64-v3"):
        library.prebuild("x86-64-v3", native.PREBUILT)
    assert list(native.PREBUILT.iterdir()) == []


# ---- the script


def assigned_libraries() -> list[NativeLibrary]:
    """Every NativeLibrary that a module of the plugins makes."""
    found = []
    for path in sorted((ROOT / "plugins").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            value = getattr(node, "value", None)
            if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("NativeLibrary"):
                inside = ".".join(path.relative_to(package_folders()["moshi_ttt.plugins"]).with_suffix("").parts)
                module = importlib.import_module(f"moshi_ttt.plugins.{inside}")
                found.append(getattr(module, ast.unparse(node.targets[0])))
    return found


def test_the_script_knows_every_library():
    assert len(assigned_libraries()) >= 3
    assert sorted(each.name for each in load_script("prebuild").LIBRARIES) == sorted(
        each.name for each in assigned_libraries()
    )


@needs_compiler
def test_the_script_builds_the_levels_and_finds_what_is_outdated(library, tmp_path):
    prebuild, folder = load_script("prebuild"), tmp_path / "made"
    without_levels = NativeLibrary(name="flat", what="Flat", source=library.source)
    levels = instructions.levels()[:1]
    built = prebuild.prebuild([library, without_levels], levels, folder)
    assert [path.name for path in built] == [library.prebuilt_name(levels[0]), without_levels.prebuilt_name("plain")]
    assert prebuild.outdated([library, without_levels], folder) == []
    library.source.write_text(SOURCE + "// changed\n")
    assert prebuild.outdated([library, without_levels], folder) == sorted(built)


# ---- the real one

PROGRAM = """
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from moshi_ttt.core.state import clone
from moshi_ttt.plugins.common import native
from moshi_ttt.plugins.hybrid.compiled import LIBRARY, compiled_inner_loop
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop

with patch.object(native, "PREBUILT", Path(sys.argv[1])):
    assert LIBRARY.origin() == f"Prebuilt for {sys.argv[2]}.", LIBRARY.origin()
    torch.manual_seed(0)
    weights, biases = (0.1 * torch.randn(2, 20, 20),), (torch.zeros(2, 1, 20),)
    norm = InnerNorm(1 + 0.1 * torch.randn(2, 20), 0.1 * torch.randn(2, 20), 1e-6)
    states = [clone(initial_state(weights, biases, 4, 3)) for _ in range(2)]
    scale = 1 / torch.arange(1, 5)
    for _ in range(10):
        tokens = Tokens(*torch.randn(3, 3, 1, 2, 20).unbind(0), torch.rand(3, 1, 2) / 20)
        found = compiled_inner_loop(tokens, states[0], norm, scale)
        expected = recurrent_inner_loop(tokens, states[1], norm, scale)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, atol=1e-5, rtol=1e-5)
print("equal")
"""


@needs_compiler
@pytest.mark.exhaustive  # half a minute of a compiler
@pytest.mark.parametrize("level", ["x86-64-v3", "plain"])
def test_a_prebuilt_step_is_that_of_tensor_operations(tmp_path, level):
    from moshi_ttt.plugins.hybrid.compiled import LIBRARY

    if level not in instructions.levels():
        pytest.skip(f"this processor has no {level}")
    LIBRARY.prebuild(level, tmp_path / "prebuilt")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(tmp_path / "no-compiler")}
    named = instructions.platform.machine() if level == "plain" else level
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "prebuilt"), named], env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stdout + done.stderr
    assert not (tmp_path / "cache").exists()
