"""Fake distributions: real dist-info folders and modules in a temporary folder on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest

from moshi_ttt.core.hooks import ENTRY_POINT_GROUP
from moshi_ttt.core.registry import Registry

HEADER = "from moshi_ttt.core.hooks import hookimpl\nMOSHI_TTT_API = 1\n"


class SiteFolder:
    """A folder like ``site-packages``, with what a test installed in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: list[str] = []

    def install(
        self, distribution: str, plugins: dict[str, str], *, version: str = "1.0", header: str = HEADER
    ) -> None:
        """Install a distribution with one module per plugin: ``{entry-point name: source}``."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"[{ENTRY_POINT_GROUP}]"]
        for plugin, source in plugins.items():
            module = f"fake_{distribution}_{plugin}".replace("-", "_")
            (self.path / f"{module}.py").write_text(header + dedent(source))
            self.modules.append(module)
            lines.append(f"{plugin} = {module}")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def entry_points(self) -> list[metadata.EntryPoint]:
        """Those of the distributions installed here, in the order of the file system."""
        found = metadata.distributions(path=[str(self.path)])
        return [point for distribution in found for point in distribution.entry_points]

    def registry(self, *, warn: str | None = None) -> Registry:
        """A registry filled from here. ``warn`` is a warning that must come."""
        registry = Registry()
        with nullcontext() if warn is None else pytest.warns(UserWarning, match=warn):
            registry.discover(self.entry_points())
        return registry


TOY = "tests.unit.core.toy"


@pytest.fixture
def site_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteFolder]:
    folder = SiteFolder(tmp_path / "site")
    folder.path.mkdir()
    monkeypatch.syspath_prepend(folder.path)
    monkeypatch.delenv("MOSHI_TTT_PLUGINS", raising=False)
    yield folder
    for module in folder.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def blocks() -> Callable[..., str]:
    """Source of a plugin that registers variants, all of them the toy."""

    def source(*names: str) -> str:
        add = "\n".join(
            f"    registrar.add({name!r}, config='{TOY}:AnyNameConfig', block='{TOY}:ToyBlock')" for name in names
        )
        return f"@hookimpl\ndef moshi_ttt_blocks(registrar):\n{add}\n"

    return source
