"""Benchmarks, scripts and examples use names that the package has: nothing else runs all of them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.project import ROOT

PROGRAMS = sorted(
    path for folder in ("benchmarks", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def imported(tree: ast.Module) -> Iterator[tuple[str, Any, bool]]:
    """Each name that a program imports from the package: the name, what it is, and whether the package has it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moshi_ttt" and not node.level:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                try:
                    found = getattr(module, alias.name)
                except AttributeError:
                    try:
                        found = importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        yield f"{node.module}.{alias.name}", None, False
                        continue
                yield alias.asname or alias.name, found, True


def missing(source: str) -> list[str]:
    """The names of the package that a program uses and the package does not have."""
    tree = ast.parse(source)
    names = list(imported(tree))
    absent = [name for name, _, there in names if not there]
    modules = {name: found for name, found, _ in names if isinstance(found, ModuleType)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                absent.append(f"{node.value.id}.{node.attr}")
    return absent


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_uses_names_that_exist(program: Path):
    assert missing(program.read_text(encoding="utf-8")) == []


def test_a_name_that_moved_is_found():
    program = "from moshi_ttt.core import no_such\nfrom moshi_ttt.plugins.hybrid import inner_loop as loop\nloop.x()"
    assert missing(program) == ["moshi_ttt.core.no_such", "loop.x"]
