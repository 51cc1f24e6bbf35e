"""Runs on several ranks against one process: the same losses, the same parameters, the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.training.checkpoint import find_checkpoints
from moshi_ttt.training.run import run
from tests.ranks import launch

from .conftest import records, values

WORKER = Path(__file__).parent / "rank_worker.py"
LORA = {"enable": True, "rank": 2, "scaling": 2.0}
CLOSE = 1e-5


def block(variant: str, layers: str, **options: Any) -> dict[str, Any]:
    return {"variant": variant, "layers": layers, "chunk": 4, **options}


# Pairwise: each variant, checkpointing, LoRA, accumulation and carrying meet each other.
CASES: dict[str, dict[str, Any]] = {
    "linear, checkpointing, LoRA": {
        "ttt": [block("ttt_linear", "1,3")], "gradient_checkpointing": True, "lora": LORA,
    },
    "mlp, carried": {"ttt": [block("ttt_mlp", "0,2")], "carry_state": True},
    "mlp, checkpointing": {"ttt": [block("ttt_mlp", "3")], "gradient_checkpointing": True},
    "multilayer, checkpointing, carried, LoRA": {
        "ttt": [block("ttt_multilayer", "2", depth=3)], "gradient_checkpointing": True, "carry_state": True,
        "lora": LORA,
    },
    "ridge, carried": {"ttt": [block("ttt_ridge", "0,2", heads=2)], "carry_state": True},
    "gating, LoRA": {"ttt": [block("gating_mlp", "1,2", lr=0.3, train_w_down=True)], "lora": LORA},
    "gating and mlp, checkpointing, carried": {
        "ttt": [block("gating_mlp", "0", lr=0.3), block("ttt_mlp", "2")], "gradient_checkpointing": True,
        "carry_state": True,
    },
    "everything, with a block": {"ttt": [block("ttt_linear", "2")], "full_finetuning": True},
    "LoRA alone": {"ttt": [], "lora": LORA, "gradient_checkpointing": True},
}  # fmt: skip


def write(folder: Path, encoded: Path, name: str, case: dict[str, Any], split: tuple[int, int], **changes: Any) -> Path:
    """The config of a case with a batch and a number of micro-batches."""
    batch, micro = split
    config = {**values(encoded, folder / name), **case, "batch_size": batch, "num_microbatches": micro, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train_on(ranks: int, configs: list[Path]) -> None:
    """A run of each config, one after the other, on so many ranks."""
    launch(WORKER, *configs, ranks=ranks, timeout=500)


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every trained parameter at the end of a run."""
    folder = find_checkpoints(run_dir)[-1]
    found = {}
    for name in ("adapter/adapter.safetensors", "consolidated/consolidated.safetensors"):
        if (folder / name).is_file():
            found |= load_file(folder / name)
    assert found
    return found


def apart(first: Path, second: Path) -> tuple[float, float]:
    """The largest difference between two runs: of losses, and of parameters."""
    a, b = ([record["loss"] for record in records(folder)] for folder in (first, second))
    assert len(a) == len(b) > 0
    p, q = trained(first), trained(second)
    assert p.keys() == q.keys()
    return max(abs(x - y) for x, y in zip(a, b, strict=True)), max(float((p[n] - q[n]).abs().max()) for n in p)


def test_two_ranks_make_the_same_run_as_one_process(encoded, tmp_path):
    case = CASES["multilayer, checkpointing, carried, LoRA"]
    alone = parse_settings(
        yaml.safe_load(write(tmp_path, encoded, "one", case, (4, 1), max_steps=3).read_text()),
        registry=default_registry(), where="one",
    )  # fmt: skip
    run(alone, default_registry(), Console(quiet=True))
    train_on(
        2, [write(tmp_path, encoded, "two", case, (1, 2), max_steps=3, log_health=True)]
    )  # of the first rank alone
    assert all(record["blocks"] for record in records(tmp_path / "two"))
    losses, parameters = apart(tmp_path / "one", tmp_path / "two")
    assert losses < CLOSE
    assert parameters < CLOSE
    assert all(record["tokens"] == other["tokens"] for record, other in zip(
        records(tmp_path / "one"), records(tmp_path / "two"), strict=True
    ))  # fmt: skip


@pytest.mark.slow
def test_every_variant_on_two_and_four_ranks(encoded, tmp_path):
    # Ten steps of AdamW with eps 1e-6; one launch for each number of ranks.
    splits = {1: [(4, 1)], 2: [(2, 1), (1, 2)], 4: [(1, 1)]}
    for ranks, each in splits.items():
        train_on(ranks, [
            write(tmp_path, encoded, f"{ranks} {index} {name}", case, each[index % len(each)], max_steps=10)
            for index, (name, case) in enumerate(CASES.items())
        ])  # fmt: skip
    for index, name in enumerate(CASES):
        for ranks in (2, 4):
            losses, parameters = apart(tmp_path / f"1 {index} {name}", tmp_path / f"{ranks} {index} {name}")
            print(f"{ranks} ranks, {name}: losses {losses:.2g}, parameters {parameters:.2g}")
            assert losses < CLOSE, (name, ranks)
            assert parameters < CLOSE, (name, ranks)


@pytest.mark.slow
def test_replicated_shards_make_the_same_run(encoded, tmp_path):
    case = CASES["gating and mlp, checkpointing, carried"]
    train_on(1, [write(tmp_path, encoded, "one", case, (4, 1), max_steps=5)])
    train_on(4, [write(tmp_path, encoded, "hsdp", case, (1, 1), max_steps=5, shard_size=2, log_health=True)])
    assert max(apart(tmp_path / "one", tmp_path / "hsdp")) < CLOSE


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_in_one_process(encoded, tmp_path):
    case = CASES["multilayer, checkpointing, carried, LoRA"]
    train_on(2, [write(tmp_path, encoded, "run", case, (2, 1), max_steps=6, ckpt_freq=3, num_ckpt_keep=None)])
    middle = find_checkpoints(tmp_path / "run")[0]
    one = write(tmp_path, encoded, "one", case, (4, 1), max_steps=6, resume=str(middle))
    train_on(1, [one])
    losses = [record["loss"] for record in records(tmp_path / "run")][3:]
    assert losses == pytest.approx([record["loss"] for record in records(tmp_path / "one")], abs=CLOSE)
    first, second = trained(tmp_path / "run"), trained(tmp_path / "one")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < CLOSE
    # What was loaded is what was saved, bit for bit: without a step, the same adapter comes out.
    still = {"lr": 0.0, "weight_decay": 0.0, "lr_groups": {"ttt": 0.0, "gates": 0.0}}
    idle = write(tmp_path, encoded, "idle", case, (4, 1), max_steps=6, resume=str(middle), optim=still)
    train_on(1, [idle])
    saved, loaded = load_file(middle / "adapter" / "adapter.safetensors"), trained(tmp_path / "idle")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
