"""Find a config: one that ships with the package by its name, any other by its path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from moshi_ttt.core.errors import ConfigError, nearest
from moshi_ttt.core.paths import user_path


def packaged_configs() -> dict[str, Path]:
    """Name -> file of every config that ships with the package, sorted by name."""
    folder = Path(str(resources.files("moshi_ttt.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file of the config ``name``: a path, or the bare name of a packaged config.

    A bare name (no folder, no ``.yaml``) is a packaged config even where a folder of that name lies beside.
    Raises ConfigError that lists the packaged names.
    """
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    path = user_path(name)
    if path.is_file():
        return path
    what = "is a folder" if path.is_dir() else "does not exist"
    raise ConfigError(
        f"No config {name!r}: as a path it {what}, and no packaged config has that name. {nearest(name, packaged)}"
    )
