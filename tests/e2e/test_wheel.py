"""The wheel: what a user installs has every module, every data file, and finds its own plugins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.programs import load_script
from tests.project import (
    ROOT,
    copy_repository,
    package_folders,
    packages_on_disk,
    pyproject,
    root_folders,
    run_environment,
)

wheel_sizes = load_script("wheel_sizes")

DISCOVER = """
import json, sys, moshi_ttt
from moshi_ttt.core.registry import default_registry
registry = default_registry()
for entry in registry.entries():
    entry.load(), entry.load_config()
print(json.dumps({
    "folder": moshi_ttt.__file__,
    "plugins": {r.provenance.plugin: [r.status, r.reason, r.provenance.distribution] for r in registry.plugins()},
    "names": sorted(f"{e.kind} {e.name}" for e in registry.entries()),
    "root_folders": sorted(sys.modules.keys() & set(sys.argv[1:])),
}))
"""


def run(*command: str, cwd: Path, **options: object) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(repository: Path, target: Path, *options: str) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), *options, cwd=repository)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(folder / "repository")
    return build(folder / "repository", folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_every_file_of_a_package_is_in_the_wheel(wheel):
    packed = set(ZipFile(wheel).namelist())
    missing = [
        str(path.relative_to(ROOT))
        for name, top in package_folders().items()
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not _through_link(path, top)
        and "/".join((*name.split("."), *path.relative_to(top).parts)) not in packed
    ]  # fmt: skip
    assert missing == [], "add them to packages or package-data in pyproject.toml"


def _through_link(path: Path, top: Path) -> bool:
    return any(parent.is_symlink() for parent in (path, *path.parents) if top in parent.parents)


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_nothing_else_is_in_the_wheel(wheel):
    folders = {name.rpartition("/")[0] for name in ZipFile(wheel).namelist() if ".dist-info" not in name}
    packages = {name.replace(".", "/") for name in packages_on_disk()}
    strays = [f for f in folders if not any(f == p or f.startswith(f"{p}/") for p in packages)]
    assert strays == []
    assert not any("__pycache__" in folder for folder in folders)


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_wheel_says_it_is_typed_and_carries_the_licence(wheel):
    names = ZipFile(wheel).namelist()
    assert "moshi_ttt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


LARGEST = 20_000_000
"""Bytes of a wheel: it has fewer."""


def sizes_in_the_guide() -> dict[str, float]:
    """Folder -> MB, of the table in docs/maintainers.md, whose rows all have a reason."""
    section = (
        (ROOT / "docs" / "maintainers.md").read_text(encoding="utf-8").split("## The wheel\n")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| `?([^`|]+?)/?`? \| ([\d.]+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert all(len(reason) > 15 for _, _, reason in rows), rows
    return {name: float(size) for name, size, _ in rows}


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_every_megabyte_of_the_wheel_has_a_reason(wheel):
    assert wheel.stat().st_size < LARGEST
    found, told = wheel_sizes.folder_sizes(wheel), sizes_in_the_guide()
    assert told.keys() == found.keys(), "run `python scripts/wheel_sizes.py WHEEL` and give each row a reason"
    for name, size in found.items():
        assert abs(size / 1e6 - told[name]) < max(0.1, 0.1 * told[name]), f"{name} has {size / 1e6:.2f} MB"
    assert sum(found.values()) > 0.95 * wheel.stat().st_size


def test_small_folders_are_one_row(tmp_path):
    with ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("p/large.bin", bytes(600_000))
        archive.writestr("p/q/small.bin", bytes(99_999))
        archive.writestr("r/small.bin", bytes(1))
    assert wheel_sizes.folder_sizes(tmp_path / "a.whl") == {"p": 600_000, "everything else": 100_000}


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_clone_without_symlinks_builds_the_same_wheel(wheel, tmp_path):
    copy_repository(tmp_path)
    for link in [path for path in (tmp_path / "src" / "moshi_ttt").iterdir() if path.is_symlink()]:
        destination = str(link.readlink())
        link.unlink()
        link.write_text(destination)  # what git makes of a symlink where there are none
    assert set(ZipFile(build(tmp_path, tmp_path / "dist")).namelist()) == set(ZipFile(wheel).namelist())


def test_the_ordinary_wheel_is_for_every_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [name for name in ZipFile(wheel).namelist() if name.endswith(".so")] == []


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_prebuilt_libraries_are_in_a_wheel_for_one_kind_of_machine(tmp_path):
    copy_repository(tmp_path)
    folder = tmp_path / "plugins" / "common" / "prebuilt"
    folder.mkdir(exist_ok=True)
    (folder / "made-up.so").write_bytes(b"a library")
    option = "--config-setting=--build-option=--plat-name=linux_x86_64"
    assert option in (ROOT / "docs" / "maintainers.md").read_text(encoding="utf-8")
    found = build(tmp_path, tmp_path / "dist", option)
    assert found.name.endswith("-py3-none-linux_x86_64.whl")
    assert "moshi_ttt/plugins/common/prebuilt/made-up.so" in ZipFile(found).namelist()


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_discovery_from_the_wheel_loads_everything(installed, tmp_path):
    found = json.loads(
        run(sys.executable, "-c", DISCOVER, *root_folders(), cwd=tmp_path, env=run_environment(installed))
    )
    assert Path(found["folder"]).is_relative_to(installed), "the wheel is tested, not the checkout"
    assert found["root_folders"] == []
    expected = pyproject()["project"]["entry-points"]["moshi_ttt"]
    ours = {plugin: record for plugin, record in found["plugins"].items() if record[2] == "moshi-ttt"}
    assert ours == {plugin: ["loaded", "", "moshi-ttt"] for plugin in expected}
    blocks = ("ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp")
    for name in (*(f"block {block}" for block in blocks), "host moshi", "precision_policy fp32_state"):
        assert name in found["names"]


@pytest.mark.exhaustive  # CI builds a wheel and loads what is in it
def test_command_line_of_the_wheel_runs(installed, tmp_path):
    command = installed / "bin" / "moshi-ttt"
    version = run(sys.executable, str(command), "--version", cwd=tmp_path, env=run_environment(installed))
    assert version.split() == ["moshi-ttt", pyproject()["project"]["version"]]
