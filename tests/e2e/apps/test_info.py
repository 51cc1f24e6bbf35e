"""``moshi-ttt info``: what it lists, and what it says where a compiler, a device or a plugin is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moshi_ttt.apps import info
from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.core.hooks import hookimpl
from moshi_ttt.core.registry import Registry
from tests.project import pyproject

VARIANTS = ("gating_mlp", "ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge")


def printed(cli) -> dict:
    result = cli("info", "--json")
    assert result.exit_code == 0, result.said
    return json.loads(result.stdout)


def form(found: dict, variant: str, name: str) -> dict:
    (match,) = (each for each in found["backends"][variant]["forms"] if each["name"] == name)
    return match


def test_everything_is_listed(cli):
    found = printed(cli)
    assert list(found) == ["system", "packages", "compilers", "environment", "backends", "problems"]
    for name in ("torch", "moshi", "sphn", "moshi-ttt"):
        assert found["packages"][name][0].isdigit()
    installed = {line.partition(">")[0] for line in pyproject()["project"]["dependencies"]}
    assert installed | {"moshi-ttt", "triton"} <= found["packages"].keys()
    assert found["system"]["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert set(VARIANTS) <= found["backends"].keys()
    assert [each["name"] for each in found["backends"]["ttt_ridge"]["forms"]] == ["compiled step"]
    assert found["problems"] == []


def test_the_tables_say_the_same(cli):
    said = cli("info").said
    for part in ("System", "Packages", "Compilers", "Faster forms", "compiled step", *VARIANTS, torch.__version__):
        assert part in said
    assert said.count("tensor operations") >= len(VARIANTS)


def test_without_a_compiler_the_compiled_steps_say_why(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = printed(cli)
    for variant in VARIANTS:
        step = form(found, variant, "compiled step")
        assert step["available"] is False
        assert step["missing"] == "The C++ compiler g++ was not found. Install g++, or name another compiler in CXX."
    (compiler,) = found["compilers"].values()
    assert compiler == "g++ was not found. Install g++, or name another compiler in CXX."
    assert found["problems"] == [], "a machine without a compiler is not broken"


def test_a_library_that_is_built_needs_no_compiler(cli, monkeypatch, tmp_path):
    from moshi_ttt.plugins.hybrid.compiled import LIBRARY

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "moshi-ttt" / LIBRARY.version()
    folder.mkdir(parents=True)
    (folder / f"{LIBRARY.name}.so").touch()
    found = printed(cli)
    assert form(found, "ttt_mlp", "compiled step")["available"] is True
    assert form(found, "gating_mlp", "compiled step")["available"] is False


def test_a_cache_that_cannot_be_written_is_a_reason(cli, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = form(printed(cli), "ttt_mlp", "compiled step")["missing"]
    assert said == f"{tmp_path / 'cache'} is not a folder that can be written. Name another one in XDG_CACHE_HOME."


def test_another_compiler_is_named(cli, monkeypatch, tmp_path):
    compiler = tmp_path / "their-c++"
    compiler.write_text("#!/bin/sh\necho their compiler 9.1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert printed(cli)["compilers"].popitem()[1] == f"{compiler}: their compiler 9.1"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert printed(cli)["compilers"].popitem()[1] == f"{compiler}: no version; exit code 3"


def test_without_a_cuda_device_the_kernels_say_why(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = printed(cli)
    for variant in ("ttt_linear", "ttt_mlp"):
        for name in ("Triton step", "Triton training"):
            assert form(found, variant, name)["available"] is False
    named = [each["name"] for each in found["backends"]["ttt_multilayer"]["forms"]]
    assert named == ["compiled step", "compiled training", "Triton step"]


def test_cuda_devices_are_listed(cli, monkeypatch):
    device = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    system = printed(cli)["system"]
    assert system["CUDA"] == "PyTorch is built for 12.8"
    assert system["cuda:0"] == "Some GPU, 80.0 GiB, compute capability 9.0"


def test_a_torch_without_cuda_and_one_without_a_device_differ(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert printed(cli)["system"]["CUDA"] == "This PyTorch was built without CUDA."
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert printed(cli)["system"]["CUDA"] == "PyTorch is built for 12.8 and finds no device."


def test_a_broken_torch_is_a_problem_and_the_rest_is_printed():
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['moshi-ttt', 'info', '--json']\n"
        "from moshi_ttt.apps.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] == version("torch")
    (problem,) = found["problems"]
    assert problem.startswith("torch cannot be imported: ModuleNotFoundError: ")
    assert found["backends"] == {}


def test_a_broken_plugin_is_a_problem(cli, monkeypatch):
    class Broken:
        name, dist = "broken", None

        def load(self):
            raise ImportError("no module named 'their_kernels'")

    registry = Registry()
    with pytest.warns(UserWarning, match="their_kernels"):
        registry.discover([Broken()])
    monkeypatch.setattr("moshi_ttt.core.registry._default", registry)
    result = cli("info")
    assert result.exit_code == 1
    assert "Problem: Plugin (unknown) 0 (plugin 'broken') is failed: ImportError" in result.said


def test_distributions_with_plugins_are_listed():
    class Theirs:
        name, dist = "theirs", SimpleNamespace(name="their-ttt", version="2.3")

        def load(self):
            module = ModuleType("their_ttt")
            module.MOSHI_TTT_API = 1
            module.moshi_ttt_accelerations = moshi_ttt_accelerations
            return module

    registry = Registry()
    registry.discover([Theirs()])
    assert info.gather(registry).packages["their-ttt"] == "2.3"


@hookimpl
def moshi_ttt_accelerations(registrar) -> None:
    registrar.add("theirs", failing_report)


def failing_report() -> tuple[Acceleration, ...]:
    raise RuntimeError("their driver is gone")


def test_a_report_that_fails_is_shown_beside_the_others(monkeypatch):
    registry = Registry()
    for name, report in {"good": lambda: (Acceleration(name="fast", purpose="All."),), "bad": failing_report}.items():
        registry.register_block(name, config="no:Config", block="no:Block")
        registry.register("acceleration", name, report)
    registry.register_block("odd", config="no:Config", block="no:Block")
    registry.register("acceleration", "odd", "math:pi")
    found = info.gather(registry).backends
    assert found["good"][0].available
    assert found["bad"] == "Its report failed: RuntimeError: their driver is gone"
    assert "Register a function" in found["odd"]


def test_the_home_folder_is_not_printed(cli, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert printed(cli)["environment"]["XDG_CACHE_HOME"] == os.path.join("~", "cache")


def test_variables_that_say_nothing_are_left_out(cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in cli("info", "--json").stdout
