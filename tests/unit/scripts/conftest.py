from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.scripts.speech import make_dialogue, make_prompts


@pytest.fixture
def dialogue(tmp_path: Path) -> Path:
    """The Czech packages, as unpacked."""
    make_dialogue(tmp_path / "unpacked", "cs")
    return tmp_path / "unpacked"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The English packages, as unpacked."""
    lines = ["; a comment", "beep: [a beep]", "vm-intro: Leave a message. (tone plays)", "demo-instruct: Held out."]
    seconds = dict.fromkeys(("beep", "vm-intro", "demo-instruct", "unknown"), 1.0)
    for digit in range(8):
        seconds[f"digits/{digit}"] = 9.9
        lines.append(f"digits/{digit}: number {digit}")
    make_prompts(tmp_path / "unpacked", "en", seconds, "\n".join(lines))
    return tmp_path / "unpacked"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs there is: put ``apt-get`` and ``dpkg`` into it with ``add_tool``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder
