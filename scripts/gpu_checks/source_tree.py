"""Running from a source tree that was not installed: the plugins' entry points come from pyproject.toml."""

from __future__ import annotations

import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """Let ``import moshi_ttt`` and its entry points be found, where the distribution is not installed.

    A folder with the metadata that an installation would have written goes on ``sys.path`` for this process alone.
    """
    sys.path.insert(0, str(ROOT / "src"))
    try:
        metadata.version("moshi-ttt")
        return
    except metadata.PackageNotFoundError:
        pass
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    section = re.search(r"^\[project\.entry-points\.moshi_ttt\]\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if version is None or section is None:
        sys.exit(f"{ROOT / 'pyproject.toml'} has no version or no entry points of moshi_ttt: is this its source tree?")
    lines = [f"{name} = {target}" for name, target in re.findall(r'^(\w+) = "([^"]+)"', section[1], re.MULTILINE)]
    folder = Path(tempfile.mkdtemp(prefix="moshi-ttt-metadata-"), f"moshi_ttt-{version[1]}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moshi-ttt\nVersion: {version[1]}\n", "utf-8")
    (folder / "entry_points.txt").write_text("\n".join(["[moshi_ttt]", *lines, ""]), "utf-8")
    sys.path.append(str(folder.parent))
