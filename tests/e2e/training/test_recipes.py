"""``make recipes``: a row is a training run, with the held-out losses by name."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.project import ROOT
from tests.small_moshi import small_moshi

from .conftest import SECONDS


@pytest.fixture
def recipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_has_the_losses_of_the_held_out_recordings(recipes, encoded, tmp_path):
    recipes.ROWS["base"] += [f"moshi_paths.hf_repo_id={small_moshi()}", f"duration_sec={SECONDS}", "batch_size=1"]
    shards = dict.fromkeys(recipes.SPLITS, encoded)
    row = recipes.train("base", 0, 1, shards, tmp_path, "test")
    assert (row["steps"], row["parameters"]) == (1, 0)
    assert 1 < row["audio"] < 6
    assert row["text"] > 0
    assert row["tokens"] > 0
    assert recipes.table([row]).splitlines()[-1] == f"| base | 0 | {row['audio']:.4f} | {row['text']:.4f} |"
