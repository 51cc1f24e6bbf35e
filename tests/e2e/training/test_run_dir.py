"""The folder of a run: only what says that it is ours is resumed or replaced, by one run at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.folder_lock import LOCK
from moshi_ttt.training import run as running
from moshi_ttt.training.checkpoint import find_checkpoints

from .conftest import records


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A run folder as moshi-finetune writes it."""
    folder = tmp_path / "run"
    weights = folder / "checkpoints" / "checkpoint_000002" / "consolidated"
    weights.mkdir(parents=True)
    (weights / "lora.safetensors").write_bytes(b"days of work")
    (weights / "config.json").write_text("{}")
    (folder / "args.yaml").write_text("run_dir: run\nmax_steps: 2000\n")
    (folder / "metrics.train.jsonl").write_text('{"step": 2}\n')
    return folder


# ---- what is not ours


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite_run_dir": True}], ids=str)
def test_a_run_of_moshi_finetune_is_neither_resumed_nor_replaced(train, theirs, changes):
    before = files(theirs)
    with pytest.raises(ConfigError, match="moshi-finetune does"):
        train(ckpt_freq=2, **changes)
    assert files(theirs) == before


@pytest.mark.first_by_default
@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite_run_dir": True}], ids=str)
def test_a_run_from_before_the_marker_is_left_alone_and_can_be_started_from(train, trained, tmp_path, changes):
    trained(max_steps=2)
    (tmp_path / "run" / "run.json").unlink()
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"an unreleased moshi-ttt made it.*adapter: .*checkpoint_000002 starts"):
        train(max_steps=3, **changes)
    assert files(tmp_path / "run") == before
    newest = find_checkpoints(tmp_path / "run")[-1]
    assert train(run_dir=str(tmp_path / "other"), max_steps=1, adapter=str(newest)).step == 1


@pytest.mark.parametrize(
    "marker", ["", "[]", "{}", '{"format": "somebody\'s run"}'], ids=["empty", "list", "nothing", "another's"]
)
def test_a_run_json_that_does_not_say_so_is_no_marker(train, tmp_path, marker):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(marker)
    with pytest.raises(ConfigError, match="no run made it"):
        train(overwrite_run_dir=True)
    assert files(tmp_path / "run") == {"run.json": marker.encode()}


def test_a_marker_of_another_version_is_refused(train, trained, tmp_path):
    trained(max_steps=1)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7, "moshi_ttt": "9.0"}))
    with pytest.raises(ConfigError, match=r"of format 7.*made it \(9.0\)"):
        train(max_steps=2, resume=True)


@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite_run_dir": True}], ids=str)
def test_a_checkpoint_of_another_program_in_our_folder_is_not_replaced(train, trained, tmp_path, changes):
    trained(max_steps=1)
    other = tmp_path / "run" / "checkpoints" / "checkpoint_000002" / "consolidated"
    other.mkdir(parents=True)
    (other / "lora.safetensors").write_bytes(b"days of work")
    with pytest.raises(ConfigError, match=r"holds checkpoint_000002, without a state.json"):
        train(max_steps=2, **changes)
    assert (other / "lora.safetensors").read_bytes() == b"days of work"


def test_what_a_file_manager_leaves_is_nothing(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").touch()
    assert train(max_steps=1).step == 1


# ---- what is replaced


def test_replacing_deletes_what_runs_made_and_nothing_else(train, tmp_path):
    train(max_steps=4, ckpt_freq=2)
    run_dir = tmp_path / "run"
    mine = {"notes.txt": b"thesis", "checkpoints/best.txt": b"2", "slurm/1.out": b"...", "tensorboard/mine": b"0"}
    for name, content in mine.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_bytes(content)
    first = json.loads((run_dir / "run.json").read_text())["run_id"]
    assert train(max_steps=1, overwrite_run_dir=True).step == 1
    after = files(run_dir)
    assert mine.items() <= after.items()
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint_000001"]
    assert [record["step"] for record in records(run_dir)] == [1]
    assert json.loads(after["run.json"])["run_id"] != first


def test_a_name_that_a_marker_invents_is_not_deleted(train, trained, tmp_path):
    trained(max_steps=1)
    (tmp_path / "mine.txt").write_text("thesis")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made": ["../mine.txt", "args.yaml"]}))
    train(max_steps=1, overwrite_run_dir=True)
    assert (tmp_path / "mine.txt").read_text() == "thesis"


def test_a_run_that_fails_before_it_begins_leaves_the_disk_as_it_was(train, tmp_path, monkeypatch):
    def build(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(running, "build", build)
    with pytest.raises(RuntimeError):
        train(run_dir=str(tmp_path / "deep" / "er" / "run"))
    assert not (tmp_path / "deep").exists()


def test_a_run_keeps_its_id_and_says_how_it_ended(train, tmp_path, monkeypatch):
    def said() -> dict[str, object]:
        return json.loads((tmp_path / "run" / "run.json").read_text())

    train(max_steps=1)
    first = said()
    assert (first["status"], first["step"]) == ("done", 1)
    assert str(first["checkpoint"]).endswith("checkpoint_000001")
    monkeypatch.setattr(running.Trainer, "make_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(max_steps=2, resume=True)
    assert (said()["status"], said()["run_id"]) == ("failed", first["run_id"])


# ---- one run at a time


HOLD = """
import sys, time
from pathlib import Path
from moshi_ttt.system.folder_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder of the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite_run_dir": True}], ids=str)
def test_a_folder_that_another_process_holds_is_refused_and_it_is_named(train, tmp_path, holder, changes):
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"in use by another run \(process {holder.pid} on .*kill {holder.pid}"):
        train(**changes)
    assert files(tmp_path / "run") == before
    assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_no_lock(train, tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    assert train(max_steps=1).step == 1
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_is_held_while_a_run_goes_on_and_given_back(train, tmp_path, monkeypatch):
    tried = []
    real = running.Trainer.make_step

    def make_step(self, *args, **kwargs):
        other = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
        tried.append(subprocess.run(other, capture_output=True, text=True, check=False, timeout=60).stderr)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(running.Trainer, "make_step", make_step)
    train(max_steps=1)
    assert f"process {os.getpid()}" in tried[0]
    monkeypatch.undo()
    assert train(max_steps=2, resume=True).step == 2


def test_workers_of_a_killed_run_do_not_hold_its_folder(train, encoded, tmp_path):
    # A forked worker lives a few seconds longer than the process that it worked for.
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom moshi_ttt.system.folder_lock import hold\n"
        "with hold(Path(sys.argv[1])):\n"
        "    if (child := os.fork()) == 0:\n        time.sleep(60)\n        os._exit(0)\n"
        "    print(child, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.wait()
    try:
        assert train(max_steps=1).step == 1
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.exhaustive  # a run's id is tested above
def test_a_copy_of_a_folder_is_a_run_of_its_own(train, tmp_path):
    train(max_steps=1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert train(run_dir=str(tmp_path / "copy"), max_steps=2, resume=True).step == 2
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint_000001"]
