"""Programs of tests as ranks that can meet, as torchrun starts them, but without importing torch again in each.

A server of ``multiprocessing`` imports the package once for each process of pytest, and every rank is a fork of it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import socket
import tempfile
import time
from multiprocessing.context import BaseContext
from pathlib import Path

PROCESS = Path(__file__).with_name("rank_process.py")
IMPORTED = ["moshi_ttt.training.run", "moshi_ttt.core.testing", "torch.distributed.fsdp", "torch.distributed.tensor"]


@functools.cache
def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def launch(program: Path, *arguments: object, ranks: int = 2, timeout: float = 300) -> None:
    """Run ``program`` with ``arguments`` on so many ranks of this machine, to its end.

    Raises AssertionError with what the ranks said where one fails, or is not done after ``timeout`` seconds.
    """
    meeting = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / f"rank{rank}.txt" for rank in range(ranks)]
        processes = []
        for rank in range(ranks):
            own = {**meeting, "RANK": rank, "LOCAL_RANK": rank}
            job = {
                "environment": {**os.environ, **{name: str(value) for name, value in own.items()}},
                "arguments": [str(program), *map(str, arguments)],
                "said": str(said[rank]),
            }
            given = {"init_globals": {"JOB": job}, "run_name": "__main__"}
            processes.append(_context().Process(target=runpy.run_path, args=(str(PROCESS),), kwargs=given))  # type: ignore[attr-defined]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        words = "\n".join(path.read_text(errors="replace")[-6000:] for path in said if path.exists())
    assert codes == [0] * ranks, f"exit codes {codes} (None: killed after {timeout:g} s)\n{words}"


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port
