"""The layout: root folders are packages, everyone imports only whom they may, nobody imports a root folder by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import (
    ROOT,
    copy_import_tree,
    package_folders,
    packages_on_disk,
    pyproject,
    root_folders,
    run_environment,
)


def test_packages_are_listed_in_pyproject():
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(packages_on_disk()), "a package that is not listed is missing from the wheel only"


def test_every_package_has_an_init():
    assert [name for name, folder in packages_on_disk().items() if not (folder / "__init__.py").is_file()] == []


def test_view_for_tools_has_every_package():
    view = ROOT / "src" / "moshi_ttt"
    links = {path.name: path for path in view.iterdir() if path.is_symlink()}
    if not links:
        pytest.skip("this clone has no symlinks; only mypy, pyright and editors need them")
    mapped = {name.removeprefix("moshi_ttt."): folder for name, folder in package_folders().items() if "." in name}
    assert {name: path.resolve() for name, path in links.items()} == mapped
    assert all(not Path(path.readlink()).is_absolute() for path in links.values())


# ---- who may import whom


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    config = str(ROOT / "pyproject.toml")
    command = f"import importlinter.cli as c; c.lint_imports_command(['--no-cache', '--config', {config!r}])"
    return subprocess.run(
        [sys.executable, "-c", command], cwd=tree, env=run_environment(tree), capture_output=True, text=True
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    copy_import_tree(tmp_path)
    return tmp_path


def test_import_contracts_hold(tree):
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout
    analyzed = int(re.search(r"Analyzed (\d+) files", result.stdout)[1])
    assert analyzed >= sum(len(list(folder.glob("*.py"))) for folder in packages_on_disk().values())


@pytest.mark.exhaustive  # a test of the contracts, which `make lint` holds
@pytest.mark.parametrize(
    ("importer", "statement", "contract"),
    [
        ("core/state.py", "import moshi", "core imports no other part"),
        ("core/state.py", "from moshi_ttt.plugins.hybrid import rope", "core imports no other part"),
        ("core/state.py", "def f():\n    from moshi_ttt.hosts import moshi", "core imports no other part"),
        ("plugins/hybrid/rope.py", "import moshi_ttt.hosts.moshi", "a plugin imports core, plugins.common and"),
        ("plugins/gating_mlp/ops.py", "from moshi_ttt.plugins.hybrid import rope", "plugins.hybrid is the layer of"),
        ("plugins/common/finite.py", "from moshi_ttt.plugins.hybrid import rope", "plugins.hybrid is the layer of"),
        ("plugins/hybrid/rope.py", "import moshi_ttt.plugins.ttt_mlp.block", "plugins.common and plugins.hybrid"),
        ("plugins/ttt_mlp/block.py", "import moshi_ttt.plugins.ttt_linear.block", "plugins do not import each other"),
        ("hosts/moshi/host.py", "from moshi_ttt.plugins.hybrid import rope", "a host imports core alone"),
        ("apps/cli.py", "from moshi_ttt.plugins.ttt_linear.block import X", "plugins are reached only through"),
        ("configs/reading.py", "from moshi_ttt.apps import cli", "packages import only those below them"),
        ("configs/reading.py", "from moshi_ttt.plugins.ttt_linear.block import X", "plugins are reached only through"),
        ("data/codec.py", "from moshi_ttt.training import trainer", "packages import only those below them"),
        ("training/trainer.py", "from moshi_ttt.plugins.hybrid import rope", "plugins are reached only through"),
        ("training/step.py", "def f():\n    from moshi_ttt.apps import cli", "packages import only those below them"),
        ("training/trainer.py", "from moshi_ttt.evaluation import recall", "packages import only those below them"),
        ("evaluation/recall.py", "from moshi_ttt.training import trainer", "packages import only those below them"),
        ("evaluation/recall.py", "from moshi_ttt.apps import cli", "packages import only those below them"),
        ("evaluation/recall.py", "from moshi_ttt.plugins.hybrid import rope", "plugins are reached only through"),
        ("configs/reading.py", "from moshi_ttt.data import codec", "packages import only those below them"),
        ("data/codec.py", "from moshi_ttt.apps import cli", "packages import only those below them"),
        ("data/codec.py", "from moshi_ttt.plugins.ttt_mlp.block import X", "plugins are reached only through"),
        ("serving/engine.py", "from moshi_ttt.evaluation import recall", "packages import only those below them"),
        ("serving/engine.py", "from moshi_ttt.apps import cli", "packages import only those below them"),
        ("serving/engine.py", "from moshi_ttt.plugins.hybrid import rope", "plugins are reached only through"),
        ("hosts/moshi/host.py", "import moshi_ttt.serving.engine", "a host imports core alone"),
        ("system/threads.py", "from moshi_ttt.apps import cli", "packages import only those below them"),
        ("system/threads.py", "import moshi_ttt.hosts.moshi.host", "packages import only those below them"),
    ],
)  # fmt: skip
def test_forbidden_import_is_caught(tree, importer, statement, contract):
    path = tree / "moshi_ttt" / importer
    path.write_text(path.read_text() + f"\n\n{statement}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout
    assert re.search(rf"^{contract}.* BROKEN$", result.stdout, re.MULTILINE), result.stdout


LIBRARIES = {"common", "hybrid"}
"""Folders of plugins/ that plugins share: they register nothing."""


def test_contracts_name_every_plugin():
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    (independent,) = (contract["modules"] for contract in contracts if contract["type"] == "independence")
    (libraries,) = (contract for contract in contracts if contract["name"].endswith("import no plugin"))
    folders = {name for name in packages_on_disk() if re.fullmatch(r"moshi_ttt\.plugins\.\w+", name)}
    plugins = folders - {f"moshi_ttt.plugins.{name}" for name in LIBRARIES}
    assert set(independent) == plugins
    assert set(libraries["forbidden_modules"]) == plugins
    assert set(libraries["source_modules"]) == folders - plugins


def test_core_names_no_plugin():
    points = pyproject()["project"]["entry-points"]["moshi_ttt"]
    plugins = [name for name, target in points.items() if ".plugins." in target]
    assert len(plugins) > 4
    for path in sorted((ROOT / "core").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert [name for name in plugins if re.search(rf"\b{name}\b", text)] == [], path


# ---- names


def test_no_class_name_stands_for_two_things():
    defined: dict[str, set[str]] = {}
    for package, folder in {**packages_on_disk(), "study": ROOT / "examples" / "study"}.items():
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    defined.setdefault(node.name, set()).add(f"{package}.{path.stem}")
    assert len(defined) > 200
    assert {name: sorted(modules) for name, modules in defined.items() if len(modules) > 1} == {}


# ---- sizes

LONGEST_FILE = 350
LONGEST_FUNCTION = 60


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """``file:line name`` of each function in a file, and its lines from ``def`` to its end."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}"
            yield place, node.end_lineno - node.lineno + 1


def test_files_and_functions_are_short():
    paths = [path for folder in packages_on_disk().values() for path in sorted(folder.glob("*.py"))]
    files = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in paths}
    sizes = dict(each for path in paths for each in functions(path))
    assert len(files) > 150
    assert len(sizes) > 1000
    long_files = {name: size for name, size in files.items() if size > LONGEST_FILE}
    long_functions = {name: size for name, size in sizes.items() if size > LONGEST_FUNCTION}
    assert not long_files, f"lines of files, at most {LONGEST_FILE}: {long_files}"
    assert not long_functions, f"lines of functions, at most {LONGEST_FUNCTION}: {long_functions}"


# ---- a second copy of the registry


@pytest.mark.parametrize("folder", root_folders())
@pytest.mark.parametrize("statement", ["import {}", "import {}.x", "from {} import x", "from {}.x import y"])
def test_import_of_a_root_folder_is_banned(folder, statement):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251"]
    result = subprocess.run(
        [*command, "--stdin-filename", "examples/x.py", "-"],
        input=statement.format(folder) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "TID251" in result.stdout


def test_every_plugin_entry_point_is_a_package_of_ours():
    points = pyproject()["project"]["entry-points"]["moshi_ttt"]
    folders = {match[1] for name in packages_on_disk() if (match := re.fullmatch(r"moshi_ttt\.plugins\.(\w+)", name))}
    assert folders - LIBRARIES <= points.keys(), "a plugin without an entry point is never found"
