"""Read the configs that the apps share: a model's with its sections, or a training run's."""

from __future__ import annotations

from collections.abc import Mapping

from moshi_ttt.configs.paths import find_config
from moshi_ttt.configs.sections import SECTIONS
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.configs.speakers import Side
from moshi_ttt.configs.training import DataConfig
from moshi_ttt.core.config import TTTConfig, parse_model
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


def read_speakers(name: str, label: str | None = None, channel: str | None = None) -> tuple[str, Side]:
    """The label of Moshi's words in transcripts, and Moshi's channel in stereo recordings.

    ``label`` and ``channel`` where they are given; else what the config of a training run says of its data; else the
    defaults. Raises ConfigError.
    """
    path = find_config(name)
    values = read_mapping(path)
    data = values["data"] if RUN_KEY in values and isinstance(values.get("data"), Mapping) else {}
    given = {"speaker_label": label, "moshi_channel": channel}
    said = {key: data[key] for key in given if key in data}
    said |= {key: value for key, value in given.items() if value is not None}
    chosen = parse_model(DataConfig, {"train_data": "", **said}, "data")
    return chosen.speaker_label, chosen.moshi_channel
