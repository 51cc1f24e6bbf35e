"""The page in a real browser: it talks, shows its memory, keeps and restores it. ``make test-browser``."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from moshi_ttt.data.audio import read_audio, write_wav
from moshi_ttt.hosts.moshi.tiny import speech_files

from .browser import browser
from .client import site
from .fakes import FakeSlots

pytestmark = pytest.mark.browser
RATE = 48_000
SHOTS = os.environ.get("MOSHI_TTT_SCREENSHOTS")


@pytest.fixture
def microphone(tmp_path: Path) -> Path:
    """20 s of speech, as Chromium's microphone plays it."""
    path = tmp_path / "microphone.wav"
    write_wav(path, read_audio(speech_files()[0], RATE)[: 20 * RATE], RATE)
    return path


class Server:
    """``moshi-ttt serve quickstart`` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process, self.address = process, address


async def serve(tmp_path: Path) -> Server:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moshi_ttt", "serve", "quickstart", "--slots", "2", "--port", "0",
        "--memories", str(tmp_path / "memories"), stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stderr is not None
    said = b""
    async for line in process.stderr:
        said += line
        if b" at http" in line:
            return Server(process, line.split(b" at ")[1].decode().strip())
    raise AssertionError(said.decode())


def test_the_page_talks_and_keeps_its_memory(tmp_path: Path, microphone: Path) -> None:
    async def work() -> None:
        server = await serve(tmp_path)
        try:
            for scheme in ("light", "dark"):
                async with browser(tmp_path / f"profile-{scheme}", microphone) as page:
                    await page.call(
                        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
                    )
                    await page.open(server.address)
                    await page.click("talk")
                    await page.until("document.querySelectorAll('#sites tr').length >= 2")
                    await page.until("document.getElementById('delay').textContent.includes('ms')")
                    assert (await page.text("format")) == "Opus"
                    await page.click("save")
                    await page.until("document.querySelectorAll('#kept li').length === 1")
                    before = await page.text("sites")
                    await page.until(f"document.getElementById('sites').textContent !== {before!r}")
                    if SHOTS:
                        await page.until("Number(document.querySelector('#sites td:nth-child(5)').textContent) >= 8")
                        await page.screenshot(Path(SHOTS) / f"page-{scheme}.png")
                    await page.click("forget")
                    await page.until("document.getElementById('status').textContent.includes('at its start')")
                    await page.value("document.querySelector('#kept button').click()")
                    await page.until("document.getElementById('kept-status').textContent.startsWith('Restored')")
                    await page.click("talk")
                    await page.until("document.getElementById('talk').textContent === 'Talk'")
                    assert page.problems == []
            assert len(list((tmp_path / "memories").rglob("*.safetensors"))) == 2
        finally:
            server.process.terminate()
            await server.process.wait()

    asyncio.run(asyncio.wait_for(work(), 600))


def test_the_transcript_follows_what_moshi_says(tmp_path: Path, microphone: Path) -> None:
    async def work() -> None:
        async with site(FakeSlots()) as here, browser(tmp_path / "profile", microphone) as page:
            await page.open(here.base)
            await page.click("talk")
            await page.until("document.getElementById('transcript').textContent.includes('<7><8><9>')")
            await page.click("talk")
            await here.counts(taken=0)
            assert page.problems == []

    asyncio.run(asyncio.wait_for(work(), 300))


def test_without_a_secure_address_the_page_says_why_there_is_no_microphone(tmp_path: Path, microphone: Path) -> None:
    async def work() -> None:
        server = await serve(tmp_path)
        port = server.address.split("//")[1].split(":")[1].split("/")[0]
        try:
            rules = "--host-resolver-rules=MAP somewhere.example 127.0.0.1"
            async with browser(tmp_path / "profile", microphone, rules) as page:
                await page.open(f"http://somewhere.example:{port}/")
                await page.until("document.getElementById('problem').textContent.length > 0")
                words = await page.text("problem")
                for way in ("localhost", "https", "ssh -L"):
                    assert way in words
        finally:
            server.process.terminate()
            await server.process.wait()

    asyncio.run(asyncio.wait_for(work(), 300))
