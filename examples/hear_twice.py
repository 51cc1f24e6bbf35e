#!/usr/bin/env python3
"""Play one recording twice to a server, and plot what its memory makes of it the first and the second time.

    python examples/hear_twice.py --out hear-twice       # starts a server of the tiny Moshi itself
    python examples/hear_twice.py talk.wav --out hear-twice --server http://localhost:8998    # of `moshi-ttt serve`

Two callers of the server, each with a memory of its own, in real time. One plays the recording, some silence, and the
recording again. The other plays another recording instead the first time, as a control. Before the last presentation
both switch learning off, so that only what was heard before can help. Plotted is what the server reports every second
of each block: the inner loss of the last frames, at the fast weights as they are then. It says how well the memory
predicts the stream, Moshi's own voice in it included. It is not Moshi's loss on the recording: Moshi hears the user,
and does not predict what the user says. `benchmarks/restored_memory.py` measures the loss on speech in Moshi's voice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from torch import Tensor

from moshi_ttt.data.audio import read_audio
from moshi_ttt.hosts.moshi.slot_stats import RECENT
from moshi_ttt.hosts.moshi.tiny import speech_files
from moshi_ttt.serving.protocol import AUDIO, ERROR, EXTENSION, HANDSHAKE, METADATA
from moshi_ttt.system.output_folder import check_free, new_folder
from moshi_ttt.system.report.figures import BLUE, GREY, ORANGE, heading, legend_outside, panels, save
from moshi_ttt.system.report.inner_losses import running_mean
from moshi_ttt.system.report.tables import image, show, table
from moshi_ttt.system.report.writer import number, versions, write_report

MADE_BY = "examples/hear_twice.py"
PATIENCE = 120.0
"""Seconds that the server may take for anything: it loads a model first."""
AHEAD = 2
"""Frames that may be on their way at a time: the server drops what waits too long."""
SILENCE_SECONDS = 6.0
"""Between the presentations: more than the tiny Moshi's attention reaches back."""
SMOOTH = 4
"""Reports that the figure averages: while it learns, the inner loss falls at the end of every chunk."""
LOOKS: dict[str, dict[str, Any]] = {
    "first, learning": {"color": GREY, "linewidth": 3.0, "alpha": 0.5},
    "second": {"color": BLUE, "linewidth": 1.8},
    "after another recording": {"color": ORANGE, "linewidth": 1.5, "linestyle": "--"},
}
Series = dict[str, list[tuple[float, float]]]
"""By block: (seconds from the recording's beginning, inner loss)."""


@dataclass
class Caller:
    """One connection: how many frames were answered, and the inner losses that the server reported."""

    answered: int = 0
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def listen(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        """Take what the server says until it ends. Raises RuntimeError for its complaints."""
        async for received in ws:
            tag, payload = received.data[0], received.data[1:]
            if tag == HANDSHAKE:
                self.ready.set()
            elif tag == ERROR:
                raise RuntimeError(f"The server says: {payload.decode()}")
            elif tag == AUDIO:
                self.answered += 1
            elif tag == METADATA and (values := json.loads(payload))["type"] == "stats":
                losses = {site["site"]: site["inner_loss"] for site in values["sites"]}
                known = {site: loss for site, loss in losses.items() if loss is not None}
                self.reports.append((values["frames"], known))
            async with self.changed:
                self.changed.notify_all()
        raise RuntimeError(f"The server closed the connection with code {ws.close_code}.")

    async def say(self, ws: aiohttp.ClientWebSocketResponse, parts: Sequence[Tensor], size: int, rate: int) -> None:
        """Play ``parts``, ``[S]`` each, in real time or as fast as the server answers; the last without learning."""
        await self.ready.wait()
        begun, sent = time.monotonic(), 0
        for part in parts:
            if part is parts[-1]:
                await self._answered(sent)
                await ws.send_bytes(bytes([METADATA]) + b'{"type": "learning", "enabled": false}')
            for frame in (part.clamp(-1, 1) * 32767).round().to(torch.int16).split(size):
                await self._answered(sent - AHEAD)
                await asyncio.sleep(max(0.0, begun + sent * size / rate - time.monotonic()))
                await ws.send_bytes(bytes([AUDIO]) + frame.numpy().astype("<i2").tobytes())
                sent += 1
        await self._answered(sent)

    async def _answered(self, frames: int) -> None:
        """Wait until so many frames were answered."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.answered >= frames)


async def call(http: aiohttp.ClientSession, server: str, parts: Sequence[Tensor], info: dict[str, Any]) -> Caller:
    """One call, in which ``parts`` are played one after the other."""
    caller = Caller()
    query = {"protocol": EXTENSION, "format": "pcm_s16", "seed": "0"}
    async with http.ws_connect(f"{server}/api/chat", params=query) as ws:
        talks = asyncio.create_task(caller.say(ws, parts, info["frame_size"], info["sample_rate"]))
        listens = asyncio.create_task(caller.listen(ws))
        done, _ = await asyncio.wait({talks, listens}, return_when=asyncio.FIRST_COMPLETED)
        talks.cancel()
        listens.cancel()
        for task in done:
            task.result()  # raises what ended it
    return caller


def between(caller: Caller, first: int, last: int, frame_seconds: float) -> Series:
    """What was reported of frames ``first`` to ``last`` alone, by the time since ``first``."""
    found: Series = {}
    for frame, losses in caller.reports:
        for site, loss in losses.items():
            if first + RECENT <= frame <= last:  # a report is of the last frames before it
                found.setdefault(site, []).append(((frame - first) * frame_seconds, loss))
    return found


async def measure(server: str, recording: Path, other: Path, seconds: float, silence: float) -> dict[str, Series]:
    """The inner losses of each presentation, by the names of ``LOOKS``, of ``seconds`` and ``silence`` between."""
    async with aiohttp.ClientSession(raise_for_status=True) as http:
        async with http.get(f"{server}/api/info") as answer:
            info = await answer.json()
        rate, size = int(info["sample_rate"]), int(info["frame_size"])
        frames = int(seconds * rate) // size
        heard, strange = (read_audio(path, rate)[: frames * size] for path in (recording, other))
        frames = min(len(heard), len(strange)) // size
        heard, strange = heard[: frames * size], strange[: frames * size]
        pause = torch.zeros(round(silence * rate) // size * size)
        again, control = await asyncio.gather(
            call(http, server, [heard, pause, heard.clone()], info),
            call(http, server, [strange, pause, heard], info),
        )
    second, frame_seconds = frames + len(pause) // size, size / rate
    return {
        "first, learning": between(again, 0, frames, frame_seconds),
        "second": between(again, second, second + frames, frame_seconds),
        "after another recording": between(control, second, second + frames, frame_seconds),
    }


@asynccontextmanager
async def own_server() -> AsyncIterator[str]:
    """The address of a server of the tiny Moshi, which ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moshi_ttt", "serve", "quickstart", "--slots", "2", "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        async with aiohttp.ClientSession() as http:
            while True:
                try:
                    async with http.get(f"{address}/api/health") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("The server did not start. What it printed says why.") from None
                await asyncio.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def mean(points: Sequence[tuple[float, float]]) -> float:
    return sum(loss for _, loss in points) / len(points) if points else float("nan")


def report(folder: Path, found: dict[str, Series], recording: Path, other: Path) -> None:
    """hear_twice.png, and the means in report.md and metrics.json."""
    sites = sorted(found["first, learning"])
    if not sites:
        raise RuntimeError("The server reported no inner loss: it serves a model without a memory, or for too short.")
    figure, axes = panels(1, len(sites), width=4.2 * len(sites) + 2, height=4.0)
    for panel, site in zip(axes, sites, strict=True):
        for name, look in LOOKS.items():
            points = torch.tensor(found[name].get(site, []), dtype=torch.float64).reshape(-1, 2)
            panel.plot(points[:, 0], running_mean(points[:, 1], SMOOTH), label=name, **look)
        heading(panel, site)
        panel.set_xlabel("time in the recording (s)")
    axes[0].set_ylabel(f"inner loss, running mean of {SMOOTH} reports")
    legend_outside(figure)
    save(figure, folder / "hear_twice.png")
    means = {site: {name: mean(found[name].get(site, [])) for name in LOOKS} for site in sites}
    values = {
        "made_by": MADE_BY, "versions": versions(), "recording": str(recording), "other": str(other),
        "inner_loss": {site: {name: number(value) for name, value in each.items()} for site, each in means.items()},
        "series": {name: {site: [list(point) for point in points] for site, points in series.items()}
                   for name, series in found.items()},
    }  # fmt: skip
    rows = [(site, *(show(means[site][name], 2) for name in LOOKS)) for site in sites]
    lines = ["# A recording heard twice", "", f"- recording: {recording}", f"- another: {other}", ""]
    lines += [*table(("inner loss, mean", *LOOKS), rows), "", *image("Inner loss by time", "hear_twice.png")]
    write_report(folder, values, lines)


async def run(arguments: argparse.Namespace) -> dict[str, Series]:
    given = arguments.recording, arguments.other, arguments.seconds, arguments.silence
    if arguments.server is not None:
        return await measure(arguments.server.rstrip("/"), *given)
    async with own_server() as address:
        return await measure(address, *given)


def main() -> None:
    shipped = speech_files()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path, nargs="?", default=shipped[0], help="default: one that ships")
    parser.add_argument("--other", type=Path, default=shipped[1], help="what the control hears first")
    parser.add_argument("--server", help="address of a running server; default: one is started")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the recording, at most (default: 10)")
    parser.add_argument("--silence", type=float, default=SILENCE_SECONDS, help="seconds between (default: 6)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be new, or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if this program made it")
    arguments = parser.parse_args()
    check_free(arguments.out, made_by=MADE_BY, overwrite=arguments.overwrite)
    found = asyncio.run(run(arguments))
    with new_folder(arguments.out, made_by=MADE_BY, overwrite=arguments.overwrite) as folder:
        report(folder, found, arguments.recording, arguments.other)
    print((arguments.out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
