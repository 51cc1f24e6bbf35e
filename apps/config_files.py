"""Reading the configs that the apps share: a model's with its sections, or a training run's."""

from __future__ import annotations

from moshi_ttt.apps.config_paths import find_config
from moshi_ttt.apps.options import SECTIONS
from moshi_ttt.apps.train.settings import parse_settings
from moshi_ttt.core.config import TTTConfig
from moshi_ttt.core.config_parsing import parse_config, read_mapping
from moshi_ttt.core.registry import Registry, default_registry

RUN_KEY = "run_dir"
"""What only the config of a training run has."""


def read_config(name: str, *, registry: Registry | None = None) -> TTTConfig:
    """``find_config``, then read and validate, with the sections that the apps understand (``train``, ``stream``).

    Of a training run's config, what it says about the model and its blocks; ``extra`` is empty.
    """
    registry = registry or default_registry()
    path = find_config(name)
    values = read_mapping(path)
    if RUN_KEY in values:
        return parse_settings(values, registry=registry, where=path.name).ttt
    return parse_config(values, registry=registry, sections=SECTIONS, where=path.name)
