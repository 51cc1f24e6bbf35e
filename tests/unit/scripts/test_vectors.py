"""The scripts that make reference vectors make the shipped ones, and import nothing of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.programs import load_script
from tests.project import ROOT

SCRIPTS = {name: load_script(name) for name in ("make_ridge_vectors", "make_in_place_vectors", "make_hybrid_vectors")}
MADE = [(script, name) for script, module in SCRIPTS.items() for name in module.CASES]


@pytest.mark.parametrize(("script", "name"), MADE)
def test_a_shipped_file_is_what_its_script_makes(script, name):
    tensors, metadata = SCRIPTS[script].vectors(name)
    with safe_open(ROOT / "tests" / "goldens" / f"{name}.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        for key, tensor in tensors.items():
            assert (file.get_tensor(key) - tensor).abs().max() < 1e-11 * max(1.0, float(tensor.abs().max())), key


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_nothing_of_the_package(script):
    tree = ast.parse(Path(SCRIPTS[script].__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "argparse", "collections", "dataclasses", "itertools", "math", "pathlib"} | {
        "safetensors", "torch",
    }  # fmt: skip
