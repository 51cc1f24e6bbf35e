"""A stop: seen inside a step, one request however many signals it is, nothing lost, and an exit code that says so."""

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
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.hosts.moshi.losses import MoshiLosses
from moshi_ttt.system import interruption
from moshi_ttt.system.interruption import AGAIN_SEC, Interrupted, Interruption, Requests
from moshi_ttt.training import run as running
from moshi_ttt.training.checkpoint import CheckpointWriter, find_checkpoints
from moshi_ttt.training.stopping import Pace, launcher_warnings
from moshi_ttt.training.trainer import Trainer

from .conftest import LORA, TTT, adapter, records, same, values
from .stops import HOW, STOPPED, WHEN, Runs, check, stop_once

# ---- inside a step


def signals_in_forward(monkeypatch, *, call: int, number: int = signal.SIGTERM, noise: bool = False) -> None:
    """Send a signal to this process in the ``call``-th forward pass; with ``noise`` every loss is drawn from."""
    real, calls = MoshiLosses.sums, []

    def sums(self, model, inputs):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        found = real(self, model, inputs)
        return found * (1 + 0.1 * torch.rand(())) if noise else found

    monkeypatch.setattr(MoshiLosses, "sums", sums)


CHANGES = {
    "carried": {"ttt": TTT, "carry_state": True},
    "LoRA, inner rate rises": {"ttt": TTT, "lora": LORA, "inner_lr_warmup": True},
    "full": {"ttt": [], "full_finetuning": True, "gradient_checkpointing": True},
}


@pytest.mark.first_by_default
@pytest.mark.parametrize(("changes", "call"), [*zip(CHANGES.values(), (7, 8, 9), strict=True)], ids=CHANGES)
def test_a_step_is_given_up_and_made_again_bit_for_bit(train, tmp_path, monkeypatch, changes, call):
    changes = {**changes, "num_microbatches": 3, "batch_size": 1, "max_steps": 4}
    signals_in_forward(monkeypatch, call=0, noise=True)
    random_state = torch.get_rng_state()
    straight = train(run_dir=str(tmp_path / "straight"), **changes)
    monkeypatch.undo()
    signals_in_forward(monkeypatch, call=call, noise=True)  # in the third step
    torch.set_rng_state(random_state)
    stopped = train(stop_grace_sec=0, **changes)
    assert (stopped.step, stopped.stopped) == (2, True)
    assert stopped.checkpoint.name == "checkpoint_000002"
    monkeypatch.undo()
    signals_in_forward(monkeypatch, call=0, noise=True)
    resumed = train(resume=True, **changes)
    assert (resumed.step, resumed.stopped) == (4, False)
    assert [r["loss"] for r in records(tmp_path / "run")] == [r["loss"] for r in records(tmp_path / "straight")]
    if "lora" in changes or changes["ttt"]:
        assert same(adapter(resumed.checkpoint), adapter(straight.checkpoint))


def test_buffers_of_a_step_that_is_given_up_are_as_before(train, monkeypatch):
    from moshi_ttt.core.injection import Injection

    counter, real = torch.zeros(1), MoshiLosses.sums
    monkeypatch.setattr(Injection, "named_buffers", lambda self: iter([("counter", counter)]))
    monkeypatch.setattr(MoshiLosses, "sums", lambda *args: (counter.add_(1), real(*args))[1])
    signals_in_forward(monkeypatch, call=8)
    assert train(num_microbatches=3, batch_size=1, stop_grace_sec=0, max_steps=9, save_adapters=False).step == 2
    assert counter.item() == 6


def test_a_step_that_there_is_time_for_is_finished(train, monkeypatch):
    signals_in_forward(monkeypatch, call=8)
    outcome = train(num_microbatches=3, batch_size=1, stop_grace_sec=600, max_steps=9)
    assert (outcome.step, outcome.stopped) == (3, True)
    assert outcome.checkpoint.name == "checkpoint_000003"


def test_a_stop_while_recordings_are_read_begins_no_step(train, monkeypatch):
    real, calls = running.TrainingData.__getitem__, []

    def getitem(self, index):
        calls.append(index)
        if index == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, index)

    monkeypatch.setattr(running.TrainingData, "__getitem__", getitem)
    outcome = train(num_microbatches=3, batch_size=1, max_steps=9)
    assert (outcome.step, outcome.stopped) == (1, True)
    assert calls == [0, 1, 2, 3, 4]  # nor is the rest read


def test_a_stop_in_the_first_step_has_nothing_to_save(train, tmp_path, monkeypatch):
    signals_in_forward(monkeypatch, call=1)
    outcome = train(max_steps=3)
    assert (outcome.step, outcome.stopped, outcome.checkpoint) == (0, True, None)
    assert status(tmp_path / "run") == ("stopped", 0)
    monkeypatch.undo()
    assert train(max_steps=3, resume=True).step == 3


@pytest.mark.exhaustive  # a stop in a step is tested above
def test_a_stop_before_a_step_keeps_what_the_run_went_on_from(train, tmp_path, monkeypatch):
    # In another folder: its own checkpoint must be there, or resume=true would start from the beginning.
    first = train(max_steps=4, ckpt_freq=2)
    second = str(tmp_path / "second")
    signals_in_forward(monkeypatch, call=1)
    stopped = train(run_dir=second, max_steps=4, resume=str(first.checkpoint.with_name("checkpoint_000002")))
    assert (stopped.step, stopped.stopped) == (2, True)
    assert [path.name for path in find_checkpoints(Path(second))] == ["checkpoint_000002"]
    monkeypatch.undo()
    resumed = train(run_dir=second, max_steps=4, resume=True)
    assert same(adapter(resumed.checkpoint), adapter(first.checkpoint))


def test_a_checkpoint_that_is_there_is_not_written_again(train, monkeypatch):
    written, real = [], CheckpointWriter.save
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda self, trainer, **k: (written.append(trainer.step), real(self, trainer, **k))
    )
    signals_in_forward(monkeypatch, call=3)
    train(max_steps=9, ckpt_freq=2, stop_grace_sec=0)
    assert written == [2]
    signals_in_forward(monkeypatch, call=1)
    assert train(max_steps=9, resume=True, stop_grace_sec=0).step == 2
    assert written == [2]


# ---- evaluations, and the end


def test_a_stop_in_the_last_evaluation_is_made_up_for(train, encoded, tmp_path, monkeypatch):
    data = {"train_data": str(encoded), "eval_data": str(encoded)}
    signals_in_forward(monkeypatch, call=4)  # two steps, a segment, and in the next
    stopped = train(max_steps=2, data=data, do_eval=True)
    assert (stopped.step, stopped.stopped, stopped.losses) == (2, True, {})
    assert records(tmp_path / "run", "eval") == []
    monkeypatch.undo()
    resumed = train(max_steps=2, data=data, do_eval=True, resume=True)
    assert (resumed.step, resumed.stopped, list(resumed.losses)) == (2, False, [2])
    assert len(records(tmp_path / "run", "eval")) == 1
    train(max_steps=2, data=data, do_eval=True, resume=True)
    assert len(records(tmp_path / "run", "eval")) == 1  # and not made twice


@pytest.mark.exhaustive  # the last evaluation is made up for alike
def test_a_stop_in_an_evaluation_on_the_way_is_made_up_for_too(train, encoded, tmp_path, monkeypatch):
    changes = {"data": {"train_data": str(encoded), "eval_data": str(encoded)}, "do_eval": True, "eval_freq": 2}
    changes |= {"ttt": [], "full_finetuning": True}  # the root unit is whole after a forward pass alone
    signals_in_forward(monkeypatch, call=4)
    assert train(max_steps=4, **changes).stopped
    monkeypatch.undo()
    assert train(max_steps=4, resume=True, **changes).step == 4
    train(run_dir=str(tmp_path / "straight"), max_steps=4, **changes)
    for kind in ("train", "eval"):
        first, second = (records(tmp_path / name, kind) for name in ("run", "straight"))
        assert [(r["step"], r["loss"]) for r in first] == [(r["step"], r["loss"]) for r in second]


def test_a_stop_that_comes_when_all_is_done_changes_nothing(train, tmp_path, monkeypatch):
    signals_in_forward(monkeypatch, call=2)
    outcome = train(max_steps=2)
    assert (outcome.step, outcome.stopped) == (2, False)
    assert status(tmp_path / "run") == ("done", 2)


# ---- what one request is


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tests let pass."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(interruption.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_termination_is_never_a_second_request(clock):
    requests = Requests()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        assert not requests.again(number)
        clock.now += 100
    assert requests.made


def test_ctrl_c_again_is_one_unless_it_comes_at_once(clock):
    requests = Requests()
    for passed, again in ((0.0, False), (0.01, False), (AGAIN_SEC - 0.1, False), (0.1, True)):
        clock.now += passed
        assert requests.again(signal.SIGINT) is again


def test_under_torchrun_nothing_is(clock, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    requests = Requests()
    for _ in range(3):
        assert not requests.again(signal.SIGINT)
        clock.now += 100


def test_clearing_away_is_not_interrupted_by_the_second_signal_of_a_stop(clock):
    handler = Interruption()
    with pytest.raises(Interrupted):
        handler(signal.SIGTERM, None)
    handler(signal.SIGTERM, None)
    handler(signal.SIGINT, None)
    clock.now += AGAIN_SEC
    with pytest.raises(Interrupted):
        handler(signal.SIGINT, None)


def test_a_rank_that_is_stuck_while_it_starts_is_ended(tmp_path):
    script = (
        "from torch.distributed import TCPStore\n"
        "from signal import SIGTERM\n"
        "from moshi_ttt.system import interruption\n"
        "interruption.STUCK_SEC = 0.2\n"
        "handler = lambda number, frame: None\n"  # as if it could not run, whenever the signal comes
        "interruption.handle([SIGTERM], handler)\n"
        "store = TCPStore('localhost', 0, is_master=True)\n"
        "with interruption.StopRequest(final=(handler,)):\n"
        "    print('here', flush=True)\n"
        "    store.wait(['what the other rank would write'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == STOPPED
    finally:
        process.kill()


def test_a_second_ctrl_c_ends_a_training_at_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "AGAIN_SEC", 0.0)
    real = Trainer.make_step

    def make_step(self, *args, **kwargs):
        step = real(self, *args, **kwargs)
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step

    monkeypatch.setattr(Trainer, "make_step", make_step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(max_steps=50)
    assert signal.getsignal(signal.SIGINT) is before
    assert status(tmp_path / "run") == ("interrupted", 1)
    assert find_checkpoints(tmp_path / "run") == []


# ---- exit codes


@pytest.fixture
def config(encoded, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values(encoded, tmp_path / "run")))
    return path


def test_stopped_is_75_and_done_is_0(cli, config, tmp_path, monkeypatch):
    signals_in_forward(monkeypatch, call=2)
    result = cli("train", config, "max_steps=9", "stop_grace_sec=0")
    assert result.exit_code == STOPPED, result.said
    assert "Stopped on request after step 1 of 9" in result.said
    assert status(tmp_path / "run") == ("stopped", 1)
    monkeypatch.undo()
    result = cli("train", config, "max_steps=2", "resume=true")
    assert result.exit_code == 0, result.said
    assert status(tmp_path / "run") == ("done", 2)


@pytest.mark.parametrize("late", [False, True], ids=["in start-up", "just before the first step"])
def test_stopped_before_there_is_anything_to_save_is_75_too(cli, config, tmp_path, monkeypatch, late):
    def asked(*_, **__):
        if late:
            stop.requests.again(signal.SIGTERM)
            return True
        raise Interrupted

    monkeypatch.setattr("moshi_ttt.training.stopping.SafePoints.asked_anywhere", asked)
    if not late:
        monkeypatch.setattr(running, "build", asked)
    else:
        stop = interruption.StopRequest()
        monkeypatch.setattr("moshi_ttt.apps.commands.train.StopRequest", lambda **_: stop)
    result = cli("train", config)
    assert result.exit_code == STOPPED
    assert "nothing to save" in result.said
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_2_whatever_the_run_is(cli, config, monkeypatch):
    def build(*_, **__):
        raise OSError("disk")

    monkeypatch.setattr(running, "build", build)
    assert cli("train", config).exit_code == 2


def status(run_dir: Path) -> tuple[str, int]:
    said = json.loads((run_dir / "run.json").read_text())
    return said["status"], said["step"]


# ---- the grace period


@pytest.mark.parametrize(
    ("steps", "microbatches", "grace", "kind"),
    [
        ([40.0], 1, 30, None),  # the first is not like others
        ([90.0, 10.0], 1, 30, None),
        ([90.0, 40.0], 8, 30, "given up"),
        ([90.0, 40.0], 1, 30, "lost"),
        ([90.0, 28.0], 1, 30, "lost"),  # saving takes 3
        ([90.0, 40.0], 1, 60, None),
    ],
)
def test_a_step_that_is_too_long_for_the_grace_period_is_pointed_out(steps, microbatches, grace, kind):
    pace = Pace.expecting(0)
    pace.saved(3.0)
    pace.steps.extend(steps)
    said = pace.warnings(grace, microbatches)
    assert list(said) == ([] if kind is None else [kind])
    for text in said.values():
        assert "stop_grace_sec" in text


def test_the_warning_comes_while_the_run_goes_on(settings, capsys, tmp_path):
    running.run(settings(max_steps=3, stop_grace_sec=0), default_registry(), Console(width=500))
    assert capsys.readouterr().out.count("stop_grace_sec is 0") == 1


def test_more_than_torchrun_gives_is_pointed_out(monkeypatch):
    assert launcher_warnings(600) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert launcher_warnings(30) == []
    assert "torchrun kills" in launcher_warnings(600)[0]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    assert launcher_warnings(600) == []


# ---- two ranks


def small(encoded: Path, **changes: object) -> dict[str, object]:
    return {**values(encoded, Path("unused")), "batch_size": 1, "max_steps": 100_000, **changes}


@pytest.mark.exhaustive  # a stop of one process, and two ranks that go on to the end, are tested apart
def test_two_ranks_that_are_signalled_twice_while_they_save_lose_nothing(encoded, tmp_path):
    runs = Runs(tmp_path, small(encoded, num_microbatches=2, ckpt_freq=1, num_ckpt_keep=2, carry_state=True))
    check(stop_once(runs, "everyone twice", "saving", random.Random(0)))


def reference(runs: Runs, folder: Path) -> list[float]:
    """The losses of the same steps in a run that was not stopped before."""
    folder.mkdir()
    straight, steps = Runs(folder, runs.values), runs.saved_step()
    with straight.running() as process:
        process.wait_until(lambda: straight.last_step() >= steps, f"step {steps}")
        HOW["launcher"](process, random.Random(0))
        process.ended(time.monotonic())
    return straight.losses()[:steps]


CAMPAIGN = {
    "short steps": ({}, [*HOW], 6),
    "long step": ({"num_microbatches": 24, "stop_grace_sec": 1}, ["launcher", "everyone", "everyone twice"], 6),
    "saving": ({"ckpt_freq": 1, "num_ckpt_keep": 2}, ["launcher", "everyone", "everyone twice", "ranks twice"], 6),
    "start": ({}, ["launcher", "everyone", "everyone twice"], 3),
    "evaluating": ({"do_eval": True, "eval_freq": 1}, ["launcher", "everyone", "everyone twice"], 3),
    "data workers": ({}, ["everyone twice", "Ctrl-C"], 2),
}
"""When a stop comes: what the config changes, who is signalled, how often each: a hundred in all."""


def test_the_campaign_is_a_hundred_stops():
    assert sum(len(hows) * times for _, hows, times in CAMPAIGN.values()) == 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", CAMPAIGN)
def test_a_hundred_stops(encoded, tmp_path, name, seed):
    changes, hows, times = CAMPAIGN[name]
    rng, table = random.Random(seed), []
    data = {"train_data": str(encoded), "eval_data": str(encoded), "shuffle": True}
    data |= {"num_workers": 2} if name == "data workers" else {}
    (tmp_path / "runs").mkdir()
    runs = Runs(tmp_path / "runs", small(encoded, data=data, carry_state=True, **changes))
    moment = name if name in WHEN else "short steps"
    if name == "start":
        check(stop_once(runs, "launcher", "short steps", rng))  # something that could be lost
    for how in hows * times:
        saved = runs.saved_step()
        stop = stop_once(runs, how, moment, rng)
        table.append(stop)
        print(f"{name:14} {how:16} {stop.seconds:5.1f} s  {stop.ranks} {stop.status} {stop.saved}", flush=True)
        if name == "start" and stop.saved == saved:
            # Before Python has come to our first line a signal ends a process by itself.
            assert set(stop.ranks) <= {STOPPED, -signal.SIGTERM}, stop.said
            assert (stop.left, stop.launcher) == ([], 1), stop.said
        else:
            check(stop)
    assert runs.losses()[: runs.saved_step()] == reference(runs, tmp_path / "reference")
    seconds = [stop.seconds for stop in table]
    print(f"{name}: {len(seconds)} stops, {max(seconds):.1f} s at most, {sum(seconds) / len(seconds):.1f} on average")
