"""A program that serves the tiny Moshi in a process of its own for each line it reads, so that a test can kill it.

The model is loaded once, and every server is forked from it: loading takes longer than the server is to live.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from moshi_ttt.apps.talker import SHIPPED_MEMORY, load_talker
from moshi_ttt.hosts.moshi.slots import Slots
from moshi_ttt.serving.memory_store import MemoryStore, StoreLimits
from moshi_ttt.serving.server import ServerOptions, bound_socket, serve
from moshi_ttt.serving.sessions import SessionLimits


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    print("loaded", flush=True)
    for _ in sys.stdin:
        process = os.fork()
        if process:
            _, status = os.waitpid(process, 0)
            print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
            continue
        with Slots(talker.model, talker.mimi, 3) as slots:
            options = ServerOptions(
                store=MemoryStore(folder, StoreLimits(per_owner=10**6)), sessions=SessionLimits(resume_sec=5)
            )
            serve(
                slots, str, bound_socket("127.0.0.1", 0), options,
                lambda port: print(f"port {port} {os.getpid()}", flush=True),
            )  # fmt: skip
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
