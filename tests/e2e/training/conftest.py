"""A training run small enough for a test: a small Moshi, three recordings of real speech, encoded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import Settings, parse_settings
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.shards import write_shards
from moshi_ttt.hosts.moshi.loading import load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.training.run import Outcome, run
from tests.small_moshi import small_moshi
from tests.unit.data.conftest import FRAME, RATE, words_every, write_audio, write_manifest, write_transcript

FRAMES = 12
LENGTHS = (62, 20, 33)
"""Frames of the recordings: 6, 2 and 3 segments."""
SECONDS = FRAMES / 12.5
LORA = {"enable": True, "rank": 2, "scaling": 2.0}
TTT = [{"variant": "ttt_linear", "layers": "1,3", "chunk": 4}]


@pytest.fixture(scope="session")
def encoded(tmp_path_factory) -> Path:
    """A folder of shards."""
    folder = tmp_path_factory.mktemp("speech")
    speech = torch.cat([read_audio(path, RATE) for path in speech_files()[:3]]).numpy()
    entries = []
    for number, frames in enumerate(LENGTHS):
        samples = np.stack([speech[(number + channel) * 50_000 :][: frames * FRAME] for channel in range(2)])
        seconds = frames * FRAME / RATE
        write_audio(folder / f"talk{number}.wav", samples)
        write_transcript(folder / f"talk{number}.json", words_every(0.5, seconds))
        entries.append({"path": f"talk{number}.wav", "duration": seconds})
    manifest = write_manifest(folder / "train.jsonl", entries)
    bundle = resolve_repo(small_moshi())
    codec = SpeechCodec.of(load_skeleton(small_moshi()), bundle.load_mimi(), bundle.tokenizer())
    write_shards(str(manifest), folder / "shards", codec, frames=FRAMES)
    return folder / "shards"


@pytest.fixture
def settings(encoded, tmp_path) -> Callable[..., Settings]:
    """The settings of a small run; keywords change them."""

    def make(**changes: Any) -> Settings:
        chosen = {**values(encoded, tmp_path / "run"), **changes}
        return parse_settings(chosen, registry=default_registry(), where="test")

    return make


@pytest.fixture
def train(settings) -> Callable[..., Outcome]:
    """Runs a small training."""

    def go(**changes: Any) -> Outcome:
        return run(settings(**changes), default_registry(), Console(quiet=True))

    return go


@pytest.fixture(scope="session")
def kept_runs() -> dict[str, Path]:
    """The checkpoints that ``trained`` has made, by their settings."""
    return {}


@pytest.fixture
def trained(encoded, kept_runs, tmp_path, tmp_path_factory) -> Callable[..., Path]:
    """The last checkpoint of a small run, in a copy of its folder; runs of the same settings are made once."""

    def make(place: str = "run", **changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in kept_runs:
            folder = tmp_path_factory.mktemp("kept") / "run"
            chosen = parse_settings({**values(encoded, folder), **changes}, registry=default_registry(), where="test")
            kept_runs[key] = run(chosen, default_registry(), Console(quiet=True)).checkpoint
        checkpoint = kept_runs[key]
        shutil.rmtree(tmp_path / place, ignore_errors=True)
        shutil.copytree(checkpoint.parent.parent, tmp_path / place, symlinks=True)
        return tmp_path / place / "checkpoints" / checkpoint.name

    return make


def values(encoded: Path, run_dir: Path) -> dict[str, Any]:
    """A small run as its YAML file would say it."""
    return {
        "data": {"train_data": str(encoded), "shuffle": True},
        "moshi_paths": {"hf_repo_id": small_moshi()},
        "run_dir": str(run_dir),
        "param_dtype": "float32",
        "gradient_checkpointing": False,
        "duration_sec": SECONDS,
        "batch_size": 2,
        "max_steps": 4,
        "optim": {"lr": 1e-3, "eps": 1e-6},
        "log_health": False,
        "ttt": TTT,
    }


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's log."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in a checkpoint."""
    return load_file(folder / "adapter" / "adapter.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are bit-equal."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
