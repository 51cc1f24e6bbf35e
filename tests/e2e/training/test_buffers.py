"""Training a block that keeps a persistent buffer, of a variant that another distribution provides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.core.registrar import Entry, Provenance
from moshi_ttt.core.registry import Registry
from moshi_ttt.plugins.ttt_linear.block import TTTLinear
from moshi_ttt.plugins.ttt_linear.config import TTTLinearConfig
from moshi_ttt.training.checkpoint import CheckpointError, find_checkpoints
from moshi_ttt.training.run import Outcome, run

from .conftest import adapter, same, values

SEEN = "layers.1.sequence.seen"


class CountingConfig(TTTLinearConfig):
    variant: str = "counting"


class Counting(TTTLinear):
    """Counts the tokens that it was trained on, and its gate depends on the count."""

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=info.device))

    def reset_parameters(self, generator=None):
        super().reset_parameters(generator)
        self.seen.zero_()

    def compute(self, x, state, context):
        y, after = super().compute(x, state, context)
        with torch.no_grad():
            self.seen += x.shape[1]
        return x + (y - x) / (1 + self.seen.float() / 100), after


def registry_of(distribution: str, version: str = "1.0") -> Registry:
    registry = default_registry().copy()
    provenance = Provenance("counting", distribution, version)
    registry._entries["block", "counting"] = Entry("block", "counting", Counting, provenance, CountingConfig)
    return registry


@pytest.fixture
def counting(encoded):
    def go(run_dir: Path, *, distribution: str = "acme-ttt", version: str = "1.0", **changes: Any) -> Outcome:
        registry = registry_of(distribution, version)
        block = {"variant": "counting", "layers": "1", "chunk": 4}
        chosen = {**values(encoded, run_dir), "ttt": [block], **changes}
        return run(parse_settings(chosen, registry=registry, where="test"), registry, Console(quiet=True))

    return go


def test_a_buffer_is_resumed_and_exported(counting, tmp_path):
    straight = counting(tmp_path / "straight", max_steps=4)
    counting(tmp_path / "parted", max_steps=4, ckpt_freq=2, num_ckpt_keep=None)
    shutil.rmtree(find_checkpoints(tmp_path / "parted")[-1])  # as if killed after step 2
    parted = counting(tmp_path / "parted", max_steps=4, resume=True)
    assert int(adapter(straight.checkpoint)[SEEN]) == 4 * 12
    assert adapter(straight.checkpoint)[SEEN].dtype == torch.int64
    assert same(adapter(straight.checkpoint), adapter(parted.checkpoint))


@pytest.mark.exhaustive  # a run that is resumed has it, above
def test_a_run_starts_from_an_adapters_buffer(counting, tmp_path):
    first = counting(tmp_path / "first", max_steps=2)
    second = counting(tmp_path / "second", max_steps=1, adapter=str(first.checkpoint))
    assert int(adapter(second.checkpoint)[SEEN]) == 3 * 12


@pytest.mark.first_by_default
@pytest.mark.parametrize("changes", [{"distribution": "other-ttt"}, {"version": "2.0"}])
def test_a_run_is_not_resumed_with_another_distribution_or_major_version(counting, tmp_path, changes):
    counting(tmp_path / "run", max_steps=1)
    with pytest.raises(CheckpointError, match=r"variants was \{'counting': 'acme-ttt 1'\} and is"):
        counting(tmp_path / "run", max_steps=2, resume=True, **changes)
    assert counting(tmp_path / "run", max_steps=2, resume=True, version="1.7").step == 2
