"""Killed at any moment, a run goes on from its last complete checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moshi_ttt.training.checkpoint import find_checkpoints

from .conftest import values

STEPS = 400


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moshi_ttt", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def config_of(folder: Path, encoded: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    small = {**values(encoded, folder / "run"), "max_steps": STEPS, "ckpt_freq": 1, "num_ckpt_keep": 2, "resume": True}
    path.write_text(yaml.safe_dump({**small, **changes}))
    return path


def step_of(folder: Path) -> int:
    saved = find_checkpoints(folder / "run")
    return json.loads((saved[-1] / "state.json").read_text())["step"] if saved else 0


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while step_of(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.01)


@pytest.mark.exhaustive  # a process; a signal in this one saves alike: test_resume.py
def test_a_termination_saves_and_ends_well(encoded, tmp_path):
    process = start(config_of(tmp_path, encoded))
    wait_for(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # of the same stop
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Stopped on request after step" in said
    assert step_of(tmp_path) >= 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_termination_of_two_ranks_saves_one_checkpoint(encoded, tmp_path):
    config = config_of(tmp_path, encoded, num_ckpt_keep=None, batch_size=1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "moshi_ttt"]
    process = subprocess.Popen(
        [sys.executable, *torchrun, "train", str(config)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    wait_for(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=90)
    assert "Stopped on request after step" in said
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    alone = start(config_of(tmp_path, encoded, max_steps=step_of(tmp_path) + 1))
    said, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0, said


@pytest.mark.slow
def test_twenty_kills_lose_at_most_the_step_that_was_being_saved(encoded, tmp_path):
    # A checkpoint after every step, so that most of the time one is being written.
    config, rng = config_of(tmp_path, encoded), random.Random(0)
    interrupted = 0
    for _ in range(20):
        before = step_of(tmp_path)
        process = start(config)
        wait_for(process, tmp_path, before + 1)  # it has loaded the last one, and gone on
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += bool(list((tmp_path / "run" / "checkpoints").glob(".*")))
        logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in logged] == list(range(1, len(logged) + 1))
        assert step_of(tmp_path) >= before + 1
        assert logged[-1]["step"] - step_of(tmp_path) <= 2  # one that is written, and the step that was running
    print(f"{interrupted} of 20 kills came while a checkpoint was being written; {step_of(tmp_path)} steps")
    assert interrupted > 0
    process = start(config_of(tmp_path, encoded, max_steps=step_of(tmp_path) + 1))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_ten_steps_a_kill_and_ten_more_are_twenty_steps_bit_for_bit(encoded, tmp_path):
    changes = {"max_steps": 20, "carry_state": True, "num_microbatches": 2, "lora": {"enable": True, "rank": 2}}
    runs = {}
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        config = config_of(folder, encoded, ckpt_freq=10, num_ckpt_keep=None, **changes)
        process = start(config)
        if name == "killed":
            wait_for(process, folder, 10)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert step_of(folder) == 10
            process = start(config)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == 0, said
        logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        last = find_checkpoints(folder / "run")[-1] / "adapter" / "adapter.safetensors"
        runs[name] = ([record["loss"] for record in logged], load_file(last))
    assert len(runs["straight"][0]) == 20
    assert runs["straight"][0] == runs["killed"][0]
    for name, tensor in runs["straight"][1].items():
        assert torch.equal(tensor, runs["killed"][1][name]), name
