"""``moshi-ttt new-plugin NAME``: write the distribution of a new variant, which can be installed and changed.

The skeleton is in ``skeleton/``, one template a file; ``examples/moshi-ttt-plugin-template`` is what it becomes for the
name ``delta_rule``.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.registry import Registry, default_registry

SUFFIX = ".template"


class NewPluginError(MoshiTTTError, ValueError):
    """A plugin cannot be written: its name is not allowed, or its folder exists."""


def create(name: str, folder: Path, registry: Registry | None = None) -> list[Path]:
    """Write the distribution of a variant called ``name`` to ``folder``. On an error nothing is left there.

    Returns the files written, sorted. Raises NewPluginError.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise NewPluginError(
            f"A plugin cannot be called {name!r}: it becomes a Python module. Use lower-case letters, digits and '_', "
            "starting with a letter, as in 'my_memory'."
        )
    registry = registry or default_registry()
    if claims := registry.claims("block", name):
        raise NewPluginError(f"There is a variant {name!r} already, from {claims[0]}. Choose another name.")
    if folder.exists():
        raise NewPluginError(f"{folder} exists. Choose another folder with --out, or remove it.")
    files = render(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            for path, text in files.items():
                target = temporary / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NewPluginError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return sorted(folder / path for path in files)


def distribution(name: str) -> str:
    """The name of the distribution and of its folder."""
    return f"moshi-ttt-{name.replace('_', '-')}"


def render(name: str) -> dict[PurePosixPath, str]:
    """The files of the distribution of a variant called ``name``."""
    package = f"moshi_ttt_{name}"
    values = {
        "@variant@": name,
        "@package@": package,
        "@distribution@": distribution(name),
        "@Class@": "".join(part.capitalize() for part in name.split("_")),
    }
    files = {}
    for path, text in _templates(resources.files(__name__) / "skeleton", PurePosixPath()):
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        inside = PurePosixPath("src", package, path.name) if path.parts[0] == "src" else path
        files[inside.with_name(inside.name.removesuffix(SUFFIX))] = text
    return files


def _templates(folder: Any, inside: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _templates(entry, inside / entry.name)
        elif entry.name.endswith(SUFFIX):
            yield inside / entry.name, entry.read_text(encoding="utf-8")
