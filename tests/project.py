"""What the tests of the layout and of the wheel both need to know about the repository."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def package_folders() -> dict[str, Path]:
    """Folder of every package that ``pyproject.toml`` maps to one, by import name: the roots of the packages."""
    return {name: ROOT / folder for name, folder in pyproject()["tool"]["setuptools"]["package-dir"].items()}


def root_folders() -> list[str]:
    """The folders of the repository that are import packages below ``moshi_ttt``."""
    return [folder.name for name, folder in package_folders().items() if "." in name]


def packages_on_disk() -> dict[str, Path]:
    """Every folder that holds Python files, by import name. Symlinks are not followed: they are a view for tools."""
    found = {}
    for name, top in package_folders().items():
        for folder, _, files in os.walk(top):
            if any(file.endswith(".py") for file in files):
                inside = Path(folder).relative_to(top).parts
                found[".".join((name, *inside))] = Path(folder)
    return found


def copy_repository(target: Path) -> None:
    """What a wheel is built from, as the repository has it: built elsewhere, so that no old ``build/`` is packed."""
    for top in package_folders().values():
        shutil.copytree(top, target / top.relative_to(ROOT), symlinks=True, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)


def copy_import_tree(target: Path) -> None:
    """The packages as they are imported, ``target/moshi_ttt/core/...``, in plain folders."""
    for name, top in sorted(package_folders().items()):
        shutil.copytree(
            top, target.joinpath(*name.split(".")), ignore=_without_links, symlinks=True, dirs_exist_ok=True
        )


def _without_links(folder: str, names: list[str]) -> set[str]:
    # In a clone made without symlinks, each is a small text file instead, named like the package it stands for.
    links = {name.rpartition(".")[2] for name in package_folders()} if Path(folder).name == "moshi_ttt" else set()
    return {name for name in names if name in links} | JUNK(folder, names)


def run_environment(*paths: Path) -> dict[str, str]:
    """The environment for a subprocess that finds ``paths`` before anything that is installed."""
    environment = {key: value for key, value in os.environ.items() if key != "MOSHI_TTT_PLUGINS"}
    return environment | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths)}
