"""A headless Chromium with a recording as its microphone, driven over the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 90.0
"""Seconds that anything may take here: other work may hold the cores."""
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required", "--window-size=900,1150", "--no-first-run",
)  # fmt: skip


class Page:
    """One tab. ``problems`` are the errors that its console has shown."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._ws, self._number = ws, 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        async for received in self._ws:
            message = json.loads(received.data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(message["params"]["exceptionDetails"])[:400])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.problems.append(message["params"]["entry"]["text"])
            elif message.get("id") in self._answers:
                self._answers.pop(message["id"]).set_result(message)

    async def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._ws.send_json({"id": self._number, "method": method, "params": parameters})
        message = await asyncio.wait_for(answer, PATIENCE)
        assert "error" not in message, message
        return message["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def text(self, name: str) -> str:
        return str(await self.value(f"document.getElementById({name!r}).textContent"))

    async def click(self, name: str) -> None:
        await self.value(f"document.getElementById({name!r}).click()")

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true in the page."""
        for _ in range(int(5 * PATIENCE)):
            if await self.value(f"Boolean({expression})"):
                return
            await asyncio.sleep(0.2)  # between two looks at another program
        raise AssertionError(f"{expression} stayed false: {await self.value('document.body.innerText')}")

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete'")

    async def screenshot(self, path: Path) -> None:
        """The whole page as it looks now."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def browser(folder: Path, microphone: Path, *options: str) -> AsyncIterator[Page]:
    """A tab of a new Chromium, whose profile is in ``folder`` and whose microphone plays ``microphone``, a wav."""
    assert CHROMIUM is not None, "no Chromium: install chromium, then run `make test-browser` again"
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", f"--use-file-for-fake-audio-capture={microphone}", *options,
        "about:blank", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        port = await asyncio.wait_for(_port(process.stderr), PATIENCE)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                (tab,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as ws:
                page = Page(ws)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        process.kill()
        await process.communicate()


async def _port(lines: asyncio.StreamReader) -> int:
    """The port that Chromium says it listens on."""
    async for line in lines:
        if b"DevTools listening on ws://" in line:
            return int(line.split(b"ws://")[1].split(b":")[1].split(b"/")[0])
    raise AssertionError("Chromium ended before it listened")
