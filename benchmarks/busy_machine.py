"""The quickstart on a quiet machine, and beside other work: how many times as long it takes.

    python benchmarks/busy_machine.py [--steps 120] [--loops 2] [--json FILE]

It runs `moshi-ttt quickstart` as a new user would, first alone and then beside ``--loops`` endless loops, which it
starts and ends itself. Both runs must give the same numbers; else no time is printed. Otherwise the machine must be
quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moshi_ttt.system.threads import COUNTS, WAITING, available_cores

AIM = 3.0
TOLERANCE = 1e-6
"""Largest difference of a loss, in nats. The runs have as many threads, so they are expected to be equal."""
LOOP = "import time; end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
"""Ends by itself, should nobody be left to end it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="training steps of the quickstart")
    parser.add_argument("--loops", type=int, default=2, help="endless loops beside it")
    parser.add_argument("--threads", type=int, help="as for the quickstart; what it chooses if left out")
    parser.add_argument("--timeout", type=float, default=1_800.0, help="seconds that a run may take")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    options = ["--steps", str(arguments.steps)]
    if arguments.threads is not None:
        options += ["--threads", str(arguments.threads)]
    with tempfile.TemporaryDirectory() as folder:
        quiet, first = quickstart(Path(folder, "quiet"), options, arguments.timeout)
        print(f"alone: {quiet:.1f} s, {first['machine']['threads']} thread(s)", flush=True)
        with busy_loops(arguments.loops, arguments.timeout):
            busy, second = quickstart(Path(folder, "busy"), options, arguments.timeout)
    apart = difference(first, second)
    if not apart <= TOLERANCE:
        sys.exit(f"The two runs differ by {apart:.2g} nats, and {TOLERANCE:g} is allowed. No time is printed.")
    ratio = busy / quiet
    print(f"beside {arguments.loops} busy loops: {busy:.1f} s")
    print(f"largest difference of a loss: {apart:.2g} nats")
    print(f"ratio: {ratio:.2f}; the aim is at most {AIM:g} ({available_cores()} cores)")
    if arguments.json:
        values = {
            "cores": available_cores(), "loops": arguments.loops, "steps": arguments.steps,
            "threads": first["machine"]["threads"], "quiet_seconds": quiet, "busy_seconds": busy, "ratio": ratio,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sys.exit(ratio > AIM)


def quickstart(out: Path, options: list[str], timeout: float) -> tuple[float, dict[str, Any]]:
    """Seconds of one run, and its metrics. What this shell sets for OpenMP does not count."""
    environment = {name: value for name, value in os.environ.items() if name not in (*COUNTS, *WAITING)}
    command = [sys.executable, "-m", "moshi_ttt", "quickstart", "--out", str(out), *options]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, encoding="utf-8")
    except subprocess.TimeoutExpired:
        sys.exit(f"{' '.join(command)} had not ended after {timeout:g} s.")
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return seconds, json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@contextmanager
def busy_loops(number: int, seconds: float) -> Iterator[None]:
    """So many processes that compute without end: for ``seconds`` at the very most."""
    loops: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(number):
            loops.append(subprocess.Popen([sys.executable, "-c", LOOP.format(seconds=seconds)]))
        yield
        if ended := [loop.returncode for loop in loops if loop.poll() is not None]:
            sys.exit(f"{len(ended)} of the busy loops ended early: the machine was not as busy as it should be.")
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The largest difference of a loss, in training or held out; infinite where the runs cannot be compared."""
    a, b = ([*run["training"]["losses"], *_held_out(run)] for run in (first, second))
    if len(a) != len(b) or first["machine"]["threads"] != second["machine"]["threads"]:
        return float("inf")
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _held_out(run: Mapping[str, Any]) -> list[float]:
    return [curve["mean"] for curve in run["held_out_loss"].values()]


if __name__ == "__main__":
    main()
