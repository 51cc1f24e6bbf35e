"""A live server with many callers in real time: how long ticks and answers take, behind a correctness gate.

    python benchmarks/serving.py [--slots 8 16 32] [--seconds 60] [--threads 1] [--json FILE]

The tiny Moshi with the memory that ships with it, real WebSockets on loopback, Opus both ways, every caller with speech
of their own. The callers are a process of their own. Reported: tick (one step of all rows; by the clock, and in time of
the CPU, which other work on the machine does not change), answer (from the arrival of a frame to its answer), frames
dropped, and Opus's share of one core.

The gate: tokens and samples of every caller must be bit-equal to those of the same frames alone in as many slots.
Without that, no figure is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import sphn
import torch
from torch import Tensor

from moshi_ttt.apps.live import text_of
from moshi_ttt.apps.talker import SHIPPED_MEMORY, Talker, load_talker
from moshi_ttt.hosts.moshi.slots import SlotOutput, Slots, SlotSettings
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.serving.server import ServerOptions, bound_socket, running
from moshi_ttt.serving.sessions import SessionLimits
from moshi_ttt.system.platforms import peak_memory

GATE_FRAMES = 60
"""Frames of each caller that are compared."""


class Watched:
    """Slots that keep the first frames of every caller, and the seconds of every tick, of the clock and of the CPU."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.seconds, self.cpu = slots, list[float](), list[float]()
        self.heard: dict[int, tuple[SlotSettings, list[Tensor], list[SlotOutput]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slots, name)

    def join(self, row: int, settings: SlotSettings, state: Any = None) -> None:
        self.slots.join(row, settings, state)
        self.heard[row] = settings, [], []

    def tick(self, frames: Mapping[int, Tensor]) -> dict[int, SlotOutput | None]:
        begun, computed = time.perf_counter(), time.thread_time()
        outputs = self.slots.tick(frames)
        self.cpu.append(time.thread_time() - computed)
        self.seconds.append(time.perf_counter() - begun)
        for row, frame in frames.items():
            _, heard, said = self.heard[row]
            if len(heard) < GATE_FRAMES:
                heard.append(frame.clone())
                if (output := outputs[row]) is not None:
                    said.append(output)
        return outputs

    def differing(self) -> list[int]:
        """Rows whose callers got something else than alone."""
        return [row for row, heard in self.heard.items() if not self._equal(row, *heard)]

    def _equal(self, row: int, settings: SlotSettings, heard: list[Tensor], said: list[SlotOutput]) -> bool:
        self.slots.join(row, settings)
        alone = [output for frame in heard if (output := self.slots.tick({row: frame})[row]) is not None]
        self.slots.leave(row)
        pairs = zip(alone, said, strict=True)
        return all(torch.equal(a.tokens, b.tokens) and torch.equal(a.pcm, b.pcm) for a, b in pairs)


async def call(http: aiohttp.ClientSession, port: int, number: int, seconds: float) -> None:
    """Talk in real time; what comes back is read and thrown away."""
    files = speech_files()
    speech = sphn.read(str(files[number % len(files)]), sample_rate=24_000)[0][0]
    writer = sphn.OpusStreamWriter(24_000)
    async with http.ws_connect(f"ws://127.0.0.1:{port}/api/chat?seed={number}") as ws:
        assert (await ws.receive()).data == b"\0"

        async def listen() -> None:
            async for _ in ws:
                pass

        listening = asyncio.ensure_future(listen())
        due = time.monotonic() + 0.08 * (number % 8) / 8
        for start in range(0, int(seconds * 12.5) * 1920, 1920):
            frame = np.take(speech, range(start, start + 1920), mode="wrap")
            await ws.send_bytes(b"\x01" + bytes(writer.append_pcm(frame)))
            due += 0.08
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await ws.close()
        await listening


async def call_all(port: int, callers: int, seconds: float) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await asyncio.gather(*(call(http, port, number, seconds) for number in range(callers)))


async def serve(watched: Watched, text: Callable[[int], str | None], count: int, seconds: float) -> dict[str, float]:
    with bound_socket("127.0.0.1", 0) as listening:
        options = ServerOptions(sessions=SessionLimits(resume_sec=0))
        async with running(watched, text, listening, options) as server:
            command = [sys.executable, __file__, "--call", str(server.port), str(count), str(seconds)]
            clients = await asyncio.create_subprocess_exec(*command)
            if await clients.wait():
                raise SystemExit("The callers failed.")
            async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{server.port}/metrics") as answer:
                text_figures = await answer.text()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text_figures.splitlines() if not line.startswith("#")
    }  # fmt: skip


def quantile(figures: Mapping[str, float], name: str, share: float) -> str:
    """The bound of the histogram's bucket below which a share of all values lies, in ms."""
    buckets = [(key, value) for key, value in figures.items() if key.startswith(f"moshi_ttt_{name}_bucket")]
    whole = figures[f"moshi_ttt_{name}_count"]
    bound = next(key for key, value in buckets if value >= share * whole).split('"')[1]
    return "more" if bound == "+Inf" else f"<{1000 * float(bound):.0f}"


def middle(seconds: list[float], share: float) -> float:
    """A quantile, in ms."""
    return 1000 * sorted(seconds)[int(share * len(seconds))]


def measure(talker: Talker, count: int, seconds: float) -> dict[str, Any]:
    with Slots(talker.model, talker.mimi, count) as slots:
        slots.warm_up()
        watched = Watched(slots)
        before = peak_memory() or 0
        figures = asyncio.run(serve(watched, text_of(talker), count, seconds))
        growth = (peak_memory() or 0) - before
        if differing := watched.differing():
            raise SystemExit(
                f"{count} slots: the callers of rows {differing} got something else than alone. No figures."
            )
    opus = sum(value for key, value in figures.items() if key.startswith("moshi_ttt_opus_seconds_total"))
    frames, dropped = figures["moshi_ttt_frames_total"], figures["moshi_ttt_dropped_frames_total"]
    ticks = len(watched.seconds)
    return {
        "slots": count, "compared": sum(len(heard) for _, heard, _ in watched.heard.values()), "ticks": ticks,
        "tick_ms_p50": middle(watched.seconds, 0.5), "tick_ms_p95": middle(watched.seconds, 0.95),
        "tick_cpu_ms_p50": middle(watched.cpu, 0.5), "tick_cpu_ms_p95": middle(watched.cpu, 0.95),
        "answer_ms_p50": quantile(figures, "answer_seconds", 0.5),
        "answer_ms_p95": quantile(figures, "answer_seconds", 0.95), "rows_per_tick": frames / ticks,
        "dropped": dropped / (frames + dropped), "opus_of_a_core": opus / seconds,
        "opus_cpu_ms_per_frame": 1000 * opus / frames, "peak_growth_mib": growth / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--call", nargs=3, metavar=("PORT", "CALLERS", "SECONDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        asyncio.run(call_all(int(arguments.call[0]), int(arguments.call[1]), float(arguments.call[2])))
        return
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    print(f"Load of this machine before: {load:.1f}, cores: {os.cpu_count()}", flush=True)
    talker = load_talker("quickstart", SHIPPED_MEMORY)
    results = []
    for count in arguments.slots:
        results.append(measure(talker, count, arguments.seconds))
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in results[-1].items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"load": load, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
