"""Real runs of two ranks under real torchrun, stopped by real signals, one after the other in the same folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moshi_ttt.system.folder_lock import LOCK
from moshi_ttt.training.checkpoint import find_checkpoints

LAUNCHER = Path(__file__).parent / "launcher.py"
STOPPED = 75
PATIENCE = 180.0
"""Seconds that anything may take on a busy machine before a test gives up."""


@dataclass(frozen=True)
class Stop:
    """How one run ended.

    Attributes:
        launcher: torchrun's exit code.
        ranks: its ranks' exit codes.
        seconds: from the first signal to the end of torchrun.
        logged, saved: the last step in the log, and the last complete checkpoint.
        status: what ``run.json`` says.
        said: what the run printed.
    """

    launcher: int
    ranks: list[int]
    seconds: float
    logged: int
    saved: int
    status: str | None
    left: list[str]
    said: str


@dataclass
class Runs:
    """Runs of one config on two ranks, each of which goes on from the one before."""

    folder: Path
    values: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def losses(self) -> list[float]:
        """Of every step that is in the log, in order."""
        found = [record for record in self._records() if record["kind"] == "train"]
        assert [record["step"] for record in found] == list(range(1, len(found) + 1))
        return [record["loss"] for record in found]

    def last_step(self) -> int:
        return max((record["step"] for record in self._records() if record["kind"] == "train"), default=0)

    def saved_step(self) -> int:
        saved = find_checkpoints(self.run_dir)
        return json.loads((saved[-1] / "state.json").read_text())["step"] if saved else 0

    def being_saved(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".checkpoint_*"))

    def _records(self) -> list[dict[str, Any]]:
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            with suppress(ValueError):  # one that is being written
                records.append(json.loads(line))
        return records

    @contextmanager
    def running(self) -> Iterator[Running]:
        config, record = self.folder / "config.yaml", self.folder / "ranks.json"
        config.write_text(yaml.safe_dump({**self.values, "run_dir": str(self.run_dir), "resume": True}))
        record.unlink(missing_ok=True)
        torchrun = [str(record), "--standalone", "--nproc_per_node=2", "-m", "moshi_ttt", "train", str(config)]
        with (self.folder / "said.txt").open("w") as said:
            # In a session of its own, as from a scheduler; a Ctrl-C can be sent to all of it.
            process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), *torchrun], stdout=said, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                yield Running(self, process, record)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@dataclass
class Running:
    """A run that is going on."""

    runs: Runs
    process: subprocess.Popen[bytes]
    record: Path

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"no {what} after {PATIENCE:.0f} s:\n{self.said()}"
            time.sleep(0.005)

    def ranks(self) -> list[int]:
        """Process ids, once both have been started."""
        return list(json.loads(self.record.read_text()).get("started", [])) if self.record.exists() else []

    def said(self) -> str:
        return (self.runs.folder / "said.txt").read_text()[-4000:]

    def ended(self, since: float) -> Stop:
        code = self.process.wait(timeout=PATIENCE)
        seconds, runs = time.monotonic() - since, self.runs
        try:
            status = json.loads((runs.run_dir / "run.json").read_text())["status"]
        except FileNotFoundError:
            status = None
        left = [path.name for path in (runs.run_dir / "checkpoints").glob(".*")]
        left += [LOCK] if (runs.run_dir / LOCK).exists() else []
        return Stop(
            launcher=code, ranks=json.loads(self.record.read_text())["ended"], seconds=seconds,
            logged=runs.last_step(), saved=runs.saved_step(), status=status, left=left, said=self.said(),
        )  # fmt: skip


def send(number: int, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


# ---- who is signalled, and how often


def to_launcher(running: Running, rng: random.Random) -> None:
    """What `kill` does to torchrun, which passes it on."""
    send(signal.SIGTERM, [running.process.pid])


def to_everyone(running: Running, rng: random.Random) -> None:
    """What a scheduler does: so the ranks get it twice."""
    send(signal.SIGTERM, [running.process.pid, *running.ranks()])


def to_everyone_twice(running: Running, rng: random.Random) -> None:
    """And again soon, so that torchrun passes it on twice."""
    to_everyone(running, rng)
    time.sleep(rng.uniform(0.0, 0.6))
    to_everyone(running, rng)


def to_ranks_twice(running: Running, rng: random.Random) -> None:
    """Past torchrun."""
    send(signal.SIGTERM, running.ranks())
    time.sleep(rng.uniform(0.0, 0.6))
    send(signal.SIGTERM, running.ranks())


def to_one_rank(running: Running, rng: random.Random) -> None:
    send(signal.SIGTERM, [rng.choice(running.ranks())])


def interrupt(running: Running, rng: random.Random) -> None:
    """Ctrl-C in a terminal: the launcher, its ranks, and their workers."""
    os.killpg(running.process.pid, signal.SIGINT)


HOW = {
    "launcher": to_launcher, "everyone": to_everyone, "everyone twice": to_everyone_twice,
    "ranks twice": to_ranks_twice, "one rank": to_one_rank, "Ctrl-C": interrupt,
}  # fmt: skip


# ---- when


def in_steps(running: Running, before: int, rng: random.Random) -> None:
    """At any moment after the first new step."""
    running.wait_until(lambda: running.runs.last_step() > before, "new step")
    time.sleep(rng.uniform(0.0, 0.5))


def in_long_step(running: Running, before: int, rng: random.Random) -> None:
    running.wait_until(lambda: running.runs.last_step() > before, "new step")
    time.sleep(rng.uniform(0.5, 1.5))


def while_saving(running: Running, before: int, rng: random.Random) -> None:
    running.wait_until(lambda: running.runs.last_step() > before, "new step")
    running.wait_until(running.runs.being_saved, "save")


def at_start(running: Running, before: int, rng: random.Random) -> None:
    """While Python, the data and the model are being loaded."""
    running.wait_until(lambda: len(running.ranks()) == 2, "ranks")
    time.sleep(rng.uniform(0.0, 4.0))


WHEN = {"short steps": in_steps, "long step": in_long_step, "saving": while_saving, "start": at_start}


def stop_once(runs: Runs, how: str, when: str, rng: random.Random) -> Stop:
    """Go on from where the last run stopped, and stop."""
    before = runs.last_step()
    with runs.running() as running:
        WHEN[when](running, before, rng)
        began = time.monotonic()
        HOW[how](running, rng)
        return running.ended(began)


def check(stop: Stop) -> None:
    """Nothing is lost that was done, nothing is left half-written, and every exit code says so."""
    assert stop.ranks == [STOPPED, STOPPED], stop.said
    assert stop.launcher == 1, stop.said  # torchrun has nothing else to say
    assert stop.status == "stopped", stop.said
    assert stop.saved == stop.logged > 0, stop.said
    assert stop.left == [], stop.said
