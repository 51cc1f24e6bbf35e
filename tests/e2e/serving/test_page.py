"""The page: nothing from outside, nothing inline, no markup from messages, and Ogg that the server reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moshi_ttt.serving.audio import OpusIn
from moshi_ttt.serving.http import TYPES, static_files
from moshi_ttt.serving.metrics import ServerMetrics

from .client import FRAME, RATE, Opus

FILES = static_files()
SCRIPTS = {name: text.decode() for name, text in FILES.items() if name.endswith(".js")}
STATIC = Path(__file__).parents[3] / "serving" / "static"


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []
        self.feed(FILES["index.html"].decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def test_every_file_is_served():
    assert {path.name for path in STATIC.iterdir()} == set(FILES)
    assert {Path(name).suffix for name in FILES} == set(TYPES)


def test_nothing_comes_from_outside():
    for name, content in FILES.items():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", content.decode())
        assert [address for address in found if "www.w3.org/2000/svg" not in address] == [], name


def test_nothing_is_inline():
    for tag, attributes in Page().tags:
        assert "style" not in attributes
        assert [name for name in attributes if name.startswith("on")] == []
        assert tag != "style"
        assert tag != "script" or "src" in attributes
        for key in ("src", "href"):
            assert key not in attributes or attributes[key] in FILES


def test_no_message_becomes_markup():
    for name, script in SCRIPTS.items():
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in script, name


def test_scripts_find_their_elements_and_modules():
    ids = Page().ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'element\("([\w-]+)"\)', SCRIPTS["main.js"])) <= set(ids)
    for script in SCRIPTS.values():
        for module in re.findall(r'from "\./([\w.]+)"|addModule\("([\w.]+)"\)', script):
            assert "".join(module) in FILES


def test_every_control_has_a_name_and_is_reached_by_keyboard():
    page = Page()
    html = FILES["index.html"].decode()
    for tag, attributes in page.tags:
        if tag == "input":
            assert re.search(rf'<label>[^<]*<input id="{attributes["id"]}"', html), attributes
        if tag == "button":
            assert attributes["type"] == "button"
        if tag == "canvas":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        assert int(attributes.get("tabindex", 0)) in (0, -1)
    roles = [attributes.get("role") for _, attributes in page.tags]
    assert "alert" in roles
    assert "status" in roles
    assert ("html", {"lang": "en"}) in page.tags


def test_dark_and_light_define_the_same_colors():
    style = FILES["style.css"].decode()
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in style.split("@media (prefers-color-scheme: dark)"))
    dark = {name for name in dark if name in light}
    assert light == dark


def luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast():
    style = FILES["style.css"].decode()
    for part in style.split("@media (prefers-color-scheme: dark)"):
        colors = dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        paper = luminance(colors["paper"])
        for name in ("ink", "soft", "strong", "bad", *(f"site-{site}" for site in range(6))):
            bright, dim = sorted((luminance(colors[name]), paper), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, name


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's Ogg code in Node.js")


@needs_node
def test_ogg_of_the_page_is_read_by_the_server_and_back(tmp_path):
    opus = Opus()
    for name in ("ogg.js",):
        (tmp_path / name.replace(".js", ".mjs")).write_text(SCRIPTS[name])
    pages = b"".join(opus.page(0.3 * np.sin(np.arange(FRAME) / 10))[1:] for _ in range(10))
    (tmp_path / "in").write_bytes(pages)
    (tmp_path / "run.mjs").write_text(
        "import { OggReader, OggWriter } from './ogg.mjs'; import { readFileSync, writeFileSync } from 'node:fs';\n"
        "const bytes = new Uint8Array(readFileSync('in')), reader = new OggReader(), writer = new OggWriter(24000);\n"
        "const out = [...writer.headers()]; let position = 0;\n"
        "for (let at = 0; at < bytes.length; at += 61)\n"
        "  for (const packet of reader.push(bytes.subarray(at, at + 61)))\n"
        "    out.push(writer.page(packet, position += 1920));\n"
        "writeFileSync('out', Buffer.concat(out));\n"
    )
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True)
    there = OpusIn(RATE, ServerMetrics()).decode((tmp_path / "out").read_bytes())
    assert np.array_equal(there, OpusIn(RATE, ServerMetrics()).decode(pages))
    assert len(there) == 10 * FRAME


@needs_node
def test_scripts_parse(tmp_path):
    for name, script in SCRIPTS.items():
        path = tmp_path / name.replace(".js", ".mjs")
        path.write_text(script)
        subprocess.run(["node", "--check", str(path)], check=True)


@needs_node
@pytest.mark.parametrize("how", ["secure", "plain"])
def test_the_page_in_a_stand_in_for_a_browser(tmp_path, how):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(Path(__file__).with_name("page_harness.mjs"), tmp_path)
    done = subprocess.run(["node", "page_harness.mjs", how], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stdout + done.stderr
