"""Stopping, going on, and the folder of a run: as if nothing had happened, and nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.hosts.moshi.losses import MoshiLosses
from moshi_ttt.training import checkpoint
from moshi_ttt.training import run as running
from moshi_ttt.training.checkpoint import CheckpointError, find_checkpoints
from moshi_ttt.training.step import TrainingError
from moshi_ttt.training.trainer import Trainer

from .conftest import LORA, TTT, adapter, records, same

# ---- going on


@pytest.mark.first_by_default
@pytest.mark.parametrize(
    "changes",
    [
        {"ttt": TTT, "carry_state": True, "num_microbatches": 2},
        {"ttt": [{"variant": "gating_mlp", "layers": "2", "chunk": 4}], "lora": LORA},
        {"ttt": [], "full_finetuning": True, "gradient_checkpointing": True},
        {"ttt": [TTT[0], {"variant": "gating_mlp", "layers": "3", "chunk": 4}], "carry_state": True},
    ],
    ids=["carried", "with LoRA", "full", "two blocks in a layer"],
)
def test_a_run_that_is_resumed_ends_bit_for_bit_where_one_that_was_not(train, tmp_path, changes):
    straight, parted = (str(tmp_path / name) for name in ("straight", "parted"))
    train(run_dir=straight, max_steps=4, **changes)
    train(run_dir=parted, max_steps=4, ckpt_freq=2, num_ckpt_keep=None, **changes)
    for late in find_checkpoints(Path(parted))[1:]:
        late.rename(late.with_name(f".{late.name}"))  # as if it had been killed while it wrote this one
    train(run_dir=parted, max_steps=4, resume=True, **changes)
    first, second = (find_checkpoints(Path(folder))[-1] for folder in (straight, parted))
    assert [r["loss"] for r in records(Path(straight))] == [r["loss"] for r in records(Path(parted))]
    for name in ("adapter/adapter.safetensors", "consolidated/consolidated.safetensors"):
        assert (first / name).is_file() == (second / name).is_file()
        if (first / name).is_file():
            assert same(load_file(first / name), load_file(second / name))


def test_a_checkpoint_from_before_a_state_had_all_its_entries_resumes(train, tmp_path, monkeypatch):
    """An earlier version of in-place TTT did not save how many tokens of a chunk had updates enabled."""
    changes = {"ttt": [{"variant": "gating_mlp", "layers": "3", "chunk": 5}], "carry_state": True, "max_steps": 3}
    straight, parted = (str(tmp_path / name) for name in ("straight", "parted"))
    train(run_dir=straight, **changes)
    save = checkpoint.async_save

    def earlier(tensors, **options):
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("/enabled")}
        assert len(kept) < len(tensors)
        return save(kept, **options)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "async_save", earlier)
        train(run_dir=parted, **changes, ckpt_freq=1, num_ckpt_keep=None)
    for late in find_checkpoints(Path(parted))[1:]:
        shutil.rmtree(late)
    train(run_dir=parted, **changes, resume=True)
    first, second = (find_checkpoints(Path(folder))[-1] for folder in (straight, parted))
    assert same(adapter(first), adapter(second))


def test_resuming_where_there_is_nothing_starts(train):
    assert train(resume=True, max_steps=1).step == 1


def test_a_run_that_is_done_is_done(train):
    train(max_steps=2)
    assert train(max_steps=2, resume=True).step == 2


def test_going_on_from_a_checkpoint_by_its_path(train, tmp_path):
    first = train(max_steps=2)
    outcome = train(run_dir=str(tmp_path / "other"), max_steps=3, resume=str(first.checkpoint))
    assert outcome.step == 3
    assert [record["step"] for record in records(tmp_path / "other")] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "num_microbatches"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"carry_state": True}, "carry_state was False"),
        ({"duration_sec": 2.0}, "duration_sec"),
        ({"lora": LORA}, "lora was"),
        ({"ttt": [{**TTT[0], "base_lr": 7.0}]}, "ttt was"),
        ({"ttt": [{**TTT[0], "chunk": 5}]}, "ttt was"),
        ({"precision": "fp32"}, "precision was"),
        ({"param_dtype": "bfloat16"}, "param_dtype was 'float32' and is 'bfloat16'"),
        ({"inner_lr_warmup": True}, "inner_lr_warmup was False and is True"),
        ({"full_finetuning": True}, "full_finetuning was"),
        ({"data": "another weight"}, "data was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(train, trained, encoded, changes, message):
    trained(max_steps=1)
    if "data" in changes:
        changes = {"data": {"train_data": f"{encoded}:2"}}
    with pytest.raises(CheckpointError, match=message):
        train(max_steps=2, resume=True, **changes)


@pytest.mark.parametrize("wrong", ["state.json", "resume/.metadata", "resume/__0_0.distcp"])
def test_a_damaged_checkpoint_is_refused(train, trained, tmp_path, wrong):
    folder = trained(max_steps=1)
    (folder / wrong).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="checkpoint_000001"):
        train(max_steps=2, resume=True)


@pytest.mark.first_by_default
@pytest.mark.parametrize("wrong", ["state.json", "resume/.metadata", "resume/__0_0.distcp"])
def test_a_damaged_checkpoint_names_the_newest_older_one_that_is_whole(train, trained, tmp_path, wrong):
    trained(max_steps=4, ckpt_freq=1, num_ckpt_keep=None)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint_000004" / wrong).write_bytes(b"nonsense")
    (folder / "checkpoint_000003" / "resume" / "__0_0.distcp").write_bytes(b"cut")
    with pytest.raises(CheckpointError) as error:
        train(max_steps=5, resume=True)
    hint = f"{folder / 'checkpoint_000002'} can be read: resume from it with resume={folder / 'checkpoint_000002'}."
    assert str(error.value).endswith(hint)
    assert train(max_steps=5, resume=str(folder / "checkpoint_000002")).step == 5


def test_a_damaged_checkpoint_without_an_older_one_says_so(train, trained):
    (trained(max_steps=1) / "state.json").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"is damaged: state.json .* There is no older checkpoint"):
        train(max_steps=2, resume=True)


def test_what_a_killed_save_left_is_swept_away(train, trained, tmp_path):
    trained(max_steps=1)
    left = tmp_path / "run" / "checkpoints" / ".checkpoint_000002"
    (left / "resume").mkdir(parents=True)
    assert train(max_steps=2, resume=True).step == 2
    assert not list(left.parent.glob(".*"))


def test_a_smaller_max_steps_is_refused(train, trained):
    trained(max_steps=3)
    with pytest.raises(CheckpointError, match="at step 3, and max_steps is 2"):
        train(max_steps=2, resume=True)


def test_every_other_option_is_pointed_out(trained, settings, capsys, monkeypatch):
    trained(max_steps=1)
    changed = settings(
        max_steps=2, resume=True, max_norm=0.5, gradient_checkpointing=True, optim={"lr": 1e-4, "eps": 1e-6},
        log_freq=3, num_ckpt_keep=None,
    )  # fmt: skip
    monkeypatch.setattr(running, "version", lambda name: f"{name} 9")
    running.run(changed, default_registry(), Console(width=1000))
    shown = capsys.readouterr().out
    for part in (
        "max_steps from 1 to 2", "max_norm from 1.0 to 0.5", "gradient_checkpointing from False to True",
        "optim.lr from 0.001 to 0.0001", "log_freq from 1 to 3", "num_ckpt_keep from 3 to None", "to 'torch 9'",
    ):  # fmt: skip
        assert part in shown, shown
    assert "optim.eps" not in shown
    assert "resume from" not in shown


def test_options_that_the_version_before_did_not_have_are_no_changes(trained, settings, capsys):
    state = trained(max_steps=1) / "state.json"
    values = json.loads(state.read_text())
    del values["training"]["text_weight"], values["training"]["optim"]["schedule"]
    state.write_text(json.dumps(values))
    running.run(settings(max_steps=1, resume=True), default_registry(), Console())
    shown = capsys.readouterr().out
    assert "resuming from" in shown
    assert "changed since" not in shown


def test_a_run_resumed_as_it_was_says_nothing_of_changes(train, settings, capsys):
    train(max_steps=2, ckpt_freq=1, num_ckpt_keep=None)
    running.run(settings(max_steps=2, ckpt_freq=1, num_ckpt_keep=None, resume=True), default_registry(), Console())
    assert "changed since" not in capsys.readouterr().out


@pytest.mark.exhaustive  # a run is resumed from a checkpoint by its path above
def test_going_on_from_an_older_checkpoint_replaces_the_newer_ones(train, tmp_path):
    train(max_steps=6, ckpt_freq=1, num_ckpt_keep=None)
    folder = tmp_path / "run" / "checkpoints"
    outcome = train(max_steps=6, resume=str(folder / "checkpoint_000002"), ckpt_freq=3, num_ckpt_keep=2)
    assert outcome.checkpoint.is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_000003", "checkpoint_000006"]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert train(max_steps=7, resume=True).step == 7


@pytest.mark.exhaustive  # a folder in use is refused alike below
def test_going_on_from_another_run_in_a_folder_in_use_is_refused(train, tmp_path):
    first = train(max_steps=2)
    other = str(tmp_path / "other")
    train(run_dir=other, max_steps=3)
    with pytest.raises(ConfigError, match="is of another run"):
        train(run_dir=other, max_steps=4, resume=str(first.checkpoint))
    assert len(records(Path(other))) == 3


@pytest.mark.first_by_default
@pytest.mark.parametrize("pct_start", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_rise_of_the_rate_ends_well(train, pct_start, steps):
    assert train(max_steps=steps, optim={"lr": 1e-3, "pct_start": pct_start}).checkpoint is not None


# ---- stopping


@pytest.mark.first_by_default
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends(train, tmp_path, monkeypatch, request, number):
    real = Trainer.make_step

    def make_step(self, *args, **kwargs):
        step = real(self, *args, **kwargs)
        if step.number == 2:
            os.kill(os.getpid(), number)
        return step

    monkeypatch.setattr(Trainer, "make_step", make_step)
    if signal.getsignal(number) is signal.SIG_IGN:  # where the tests themselves were started by nohup
        signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, signal.SIG_IGN))
    before = signal.getsignal(number)
    outcome = train(max_steps=50)
    assert (outcome.step, outcome.stopped) == (2, True)  # it came between two steps: no other is begun
    assert outcome.checkpoint.name == "checkpoint_000002"
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert train(max_steps=4, resume=True).step == 4


def test_a_step_that_is_not_finite_is_skipped_and_many_in_a_row_stop(train, tmp_path, monkeypatch):
    real = running.TrainingData.__getitem__
    poisoned = {1}

    def sums(self, model, inputs):
        found = real_sums(self, model, inputs)
        return found * float("nan") if calls.append(0) or len(calls) - 1 in poisoned else found

    real_sums, calls = MoshiLosses.sums, []
    monkeypatch.setattr(MoshiLosses, "sums", sums)
    assert real is running.TrainingData.__getitem__
    train(max_steps=3, ckpt_freq=1)
    assert [record["skipped"] for record in records(tmp_path / "run")] == [False, True, False]
    saved = find_checkpoints(tmp_path / "run")
    assert same(adapter(saved[0]), adapter(saved[1]))
    assert not same(adapter(saved[1]), adapter(saved[2]))
    calls.clear()
    poisoned.update(range(10))
    with pytest.raises(TrainingError, match=r"2 steps in a row.*gradients: .*Lower optim.lr"):
        train(max_steps=10, overwrite_run_dir=True, max_bad_steps=2)


def test_a_signal_while_evaluating_saves_and_ends(train, encoded, monkeypatch):
    real = Trainer.evaluate

    def evaluate(self, batches, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    data = {"train_data": str(encoded), "eval_data": str(encoded)}
    outcome = train(max_steps=50, data=data, do_eval=True, eval_freq=2)
    assert (outcome.step, outcome.stopped, outcome.losses) == (2, True, {})
    assert outcome.checkpoint.name == "checkpoint_000002"


@pytest.mark.exhaustive  # a signal to one process is tested above
def test_a_signal_to_the_whole_group_spares_the_workers(train, encoded, tmp_path, monkeypatch):
    data = {"train_data": str(encoded), "num_workers": 2}
    real = Trainer.make_step

    def make_step(self, *args, **kwargs):
        if self.step == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGINT)
                os.kill(child.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "make_step", make_step)
    outcome = train(max_steps=4, data=data)
    assert (outcome.step, outcome.stopped) == (1, True)  # no other step is begun
    monkeypatch.undo()
    assert train(max_steps=4, resume=True, data=data).step == 4
    straight = train(run_dir=str(tmp_path / "straight"), max_steps=4, data={**data, "num_workers": 0})
    assert same(adapter(find_checkpoints(tmp_path / "run")[-1]), adapter(straight.checkpoint))


def test_a_checkpoint_that_is_being_written_is_finished_when_training_cannot_go_on(train, tmp_path, monkeypatch):
    real = Trainer.make_step

    def make_step(self, *args, **kwargs):
        if self.step == 2:
            raise TrainingError("cannot go on")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "make_step", make_step)
    with pytest.raises(TrainingError):
        train(ckpt_freq=2)
    assert [folder.name for folder in find_checkpoints(tmp_path / "run")] == ["checkpoint_000002"]


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_nothing(train, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moshi_ttt.training.export.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*resume: true"):
        train(max_steps=2, lora=LORA)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# ---- the folder


def test_a_folder_in_use_is_refused(train, tmp_path):
    train(max_steps=1)
    with pytest.raises(ConfigError, match=r"resume: true.*overwrite_run_dir: true"):
        train(max_steps=1)
    assert train(max_steps=1, overwrite_run_dir=True).step == 1
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_is_never_touched(train, tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no run made it"):
        train(overwrite_run_dir=overwrite)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_what_is_not_installed_is_found_out_before_anything_is_deleted(train, tmp_path, monkeypatch):
    train(max_steps=1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(max_steps=1, overwrite_run_dir=True, tensorboard=True)
    assert find_checkpoints(tmp_path / "run")


def test_no_secret_is_written(train, tmp_path):
    train(max_steps=1, wandb={"key": "0xhidden"})
    assert "0xhidden" not in (tmp_path / "run" / "args.yaml").read_text()


def test_a_path_that_is_no_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        train(resume=str(tmp_path / "nowhere"))


@pytest.mark.exhaustive  # alike for recordings held out, in test_run.py
def test_segments_that_cannot_be_read_stop_a_run_when_they_are_too_many(train, encoded, tmp_path, capsys):
    folder = tmp_path / "speech"
    shutil.copytree(encoded.parent, folder)
    samples = (folder / "talk0.wav").read_bytes()
    (folder / "talk0.wav").write_bytes(samples[: len(samples) // 2 // 4 * 4])
    data = {"train_data": str(folder / "train.jsonl"), "max_bad_share": 0.9}
    assert train(data=data, max_steps=4).step == 4
    assert "train.jsonl:1" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="max_bad_share"):
        train(data={**data, "max_bad_share": 0.1}, max_steps=30, overwrite_run_dir=True)
