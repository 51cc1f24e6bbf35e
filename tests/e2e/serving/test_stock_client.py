"""Moshi's own Python client, unmodified, in a process of its own; only its sound device is a stand-in."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from .client import FRAME, RATE, site
from .fakes import FakeSlots

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.mark.exhaustive  # the protocol: test_callers.py
def test_the_stock_python_client_talks(tmp_path):
    frames = 40
    times = np.arange(frames * FRAME) / RATE
    spoken = (0.4 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    np.save(tmp_path / "microphone.npy", spoken)
    environment = {
        **os.environ, "PYTHONPATH": str(STAND_IN), "PYTHONUNBUFFERED": "1",
        "MICROPHONE": str(tmp_path / "microphone.npy"), "SPEAKER": str(tmp_path / "speaker.npy"),
    }  # fmt: skip

    async def work():
        slots = FakeSlots(count=1)
        async with site(slots) as here:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "moshi.client", "--host", "127.0.0.1", "--port", str(here.server.port),
                env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                for _ in range(600):
                    played = np.load(tmp_path / "speaker.npy") if (tmp_path / "speaker.npy").exists() else np.zeros(1)
                    if slots.frames.get(0, 0) >= frames - 5 and np.abs(played).max() > 0.1 and len(played) > 30 * FRAME:
                        break
                    await asyncio.sleep(0.1)
                async with here.http.get(f"{here.base}/metrics") as answer:
                    figures = await answer.text()
            finally:
                process.kill()
                said = (await process.communicate())[0].decode()
            await here.counts(taken=0)
            return played, said, figures

    played, said, figures = asyncio.run(asyncio.wait_for(work(), 120))
    assert "connected!" in said
    assert set(re.findall(r"unknown message kind (\d+)", said)) <= {"0"}, "its warning of every handshake"
    for word in ("Lost connection", "Traceback", "error"):
        assert word not in said, said
    assert "<7>" in said, "the text of the answers is printed"
    heard = played[np.abs(played) > 0]
    spectrum = np.abs(np.fft.rfft(heard[:RATE]))
    assert abs(float(np.fft.rfftfreq(len(heard[:RATE]), 1 / RATE)[spectrum.argmax()]) - 440) < 5, "it heard the echo"
    assert "moshi_ttt_sessions_total 1.0" in figures
