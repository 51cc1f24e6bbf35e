"""Commands in processes of their own, some at a time; one that is done is not run again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.threads import of_job

TAIL = 15
"""Lines of a log that are shown when its job fails."""


class StudyError(MoshiTTTError, RuntimeError):
    """A study that cannot be made, or a part of it that failed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command.

    Attributes:
        name: for messages, and of the log's file.
        arguments: of the program.
        result: the file or folder that is there once the command has succeeded; commands make it whole or not at all.
        program: what Python runs: ``moshi-ttt``, or a file.
    """

    name: str
    arguments: tuple[str, ...]
    result: Path
    program: tuple[str, ...] = ("-m", "moshi_ttt")

    @property
    def done(self) -> bool:
        return self.result.exists()


def run_jobs(
    jobs: Sequence[Job], logs: Path, *, at_once: int, say: Callable[[str], None], threads: int | None = None
) -> None:
    """Run the jobs that are not done, ``at_once`` at a time, each with ``threads`` threads (``threads.of_job``).

    The others are ended (they keep what they have saved) when one fails or the study is interrupted.

    Raises StudyError with the end of the log of the one that failed.
    """
    waiting = [job for job in jobs if not job.done]
    logs.mkdir(parents=True, exist_ok=True)
    each = of_job(threads, at_once, os.environ)
    running: set[subprocess.Popen[bytes]] = set()
    stopped = Event()

    def run(job: Job) -> None:
        if stopped.is_set():
            return
        say(job.name)
        path = logs / f"{job.name.replace('/', '_').replace(' ', '_')}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(each)}
        with path.open("ab") as log:
            command = [sys.executable, *job.program, *job.arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running.add(process)
            code = process.wait()
            running.discard(process)
        if stopped.is_set():
            return
        if code or not job.done:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            raise StudyError(
                f"{job.name} failed (exit status {code}); {path} ends with:\n" + "\n".join(lines[-TAIL:]) + "\n"
                "What is done stays done: the same command goes on from here."
            )

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, job) for job in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stopped.set()
            for process in list(running):
                process.terminate()
            raise
