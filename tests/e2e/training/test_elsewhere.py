"""A training on Windows or macOS, simulated by what they lack; and in the user's home, on any machine."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
import yaml

from .conftest import records, values

WITHOUT = """
import os, runpy, signal, sys
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGALRM", "setitimer", "SIGHUP", "SIGUSR1", "SIGUSR2", "ITIMER_REAL"):
    delattr(signal, name)
del os.sched_getaffinity
runpy.run_module("moshi_ttt", run_name="__main__")
"""
"""``python -m moshi_ttt`` without what Windows does not have."""


@pytest.mark.exhaustive  # test_platforms.py takes away one thing at a time
def test_a_training_runs_without_what_windows_lacks(encoded, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values(encoded, tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "train", str(config), "max_steps=2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert [record["memory_bytes"] for record in records(tmp_path / "run")] == [None, None]


def test_train_says_so_before_anything_is_written(cli, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(encoded, tmp_path / "run")))
    result = cli("train", "config.yaml", "data.num_workers=1")
    assert result.exit_code == 2
    assert "Set it to 0" in result.said
    assert not (tmp_path / "run").exists()


def test_train_makes_and_resumes_a_run_in_the_home(cli, encoded, tmp_path, home):
    (home / "config.yaml").write_text(yaml.safe_dump({**values(encoded, tmp_path / "x"), "run_dir": "~/run"}))
    assert cli("train", "~/config.yaml", "max_steps=1").exit_code == 0
    checkpoint = "~/run/checkpoints/checkpoint_000001"
    result = cli("train", "~/config.yaml", "max_steps=2", f"resume={checkpoint}")
    assert result.exit_code == 0, result.said
    assert "after step 1" in result.said
    assert (home / "run" / "checkpoints" / "checkpoint_000002").is_dir()
    assert not (tmp_path / "~").exists()


def test_options_that_are_paths_may_be_in_the_home(cli, encoded, tmp_path, home):
    manifest = encoded.parent / "train.jsonl"
    (home / "config.yaml").write_text(yaml.safe_dump({**values(encoded, tmp_path / "x"), "run_dir": "~/run"}))
    (home / "data").symlink_to(encoded.parent)
    made = cli("encode", "~/config.yaml", f"data.train_data=~/data/{manifest.name}", "--out=~/shards")
    assert made.exit_code == 0, made.said
    assert (home / "shards" / "index.json").is_file()
    assert cli("new-plugin", "my_memory", "--out=~/plugin").exit_code == 0
    assert (home / "plugin" / "pyproject.toml").is_file()
    for arguments in (
        ["verify", "~/no-vectors"], ["doctor", "tiny-ttt-linear", "--adapter=~/none"],
        ["quickstart", "--audio=~/no.wav", "--steps", "1"], ["evaluate", "compare", "~/none", "--out=~/compared"],
    ):  # fmt: skip
        result = cli(*arguments)
        assert result.exit_code == 2
        assert str(home) in result.said.replace(" ", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_a_run_says_how_many_threads_it_has_and_what_changed(cli, encoded, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(encoded, tmp_path / "run")))
    first = cli("train", "config.yaml", "max_steps=1")
    assert "1 rank(s) on cpu, 1 thread(s) each" in first.said, first.said
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint_000001" / "state.json").read_text())
    assert state["threads"] == 1
    again = cli("train", "config.yaml", "max_steps=2", "resume=true", "threads=2")
    assert again.exit_code == 0, again.said
    assert "1 rank(s) on cpu, 2 thread(s) each" in again.said
    assert "changed since: " in again.said
    assert "threads from 1 to 2" in again.said
    assert torch.get_num_threads() == 1
