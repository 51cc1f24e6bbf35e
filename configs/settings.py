"""From a YAML file and the command line to the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moshi_ttt.configs.paths import find_config
from moshi_ttt.configs.training import DEFAULT_REPO, IGNORED, MoshiPaths, RunConfig
from moshi_ttt.core.adapter import adapter_entries, find_adapter
from moshi_ttt.core.config import TTTConfig, parse_model
from moshi_ttt.core.config_parsing import parse_config, read_mapping
from moshi_ttt.core.errors import ConfigError, nearest
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.hosts.moshi.host import MoshiHostConfig

MODEL_KEYS = ("host", "precision", "ttt")
"""Top-level keys that describe the model, as in every other config; the others are a run's."""
REPLACED = {
    "moshi_path": "moshi_weights", "mimi_path": "mimi_weights", "tokenizer_path": "tokenizer",
    "config_path": "config_path",
}  # fmt: skip
"""What ``moshi_paths`` calls a file, and what the host's config does."""
FLAT = {"persistent_states": "carry_state", "gradient_checkpointing": "gradient_checkpointing"}
"""What the flat ``ttt`` block calls an option of the run, and what the run does."""
INNER_LOSSES = {
    "log_inner_loop_losses": "enable", "ttt_fig5_enable": "enable", "inner_loop_log_interval": "interval",
    "save_inner_loop_plots": "plots", "inner_loop_plot_dir": "plot_dir",
}  # fmt: skip
"""The same for the options of its ``inner_losses``."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run: which model with which blocks, and how it is trained."""

    ttt: TTTConfig
    run: RunConfig
    host: MoshiHostConfig


def read_settings(name: str, overrides: Sequence[str], registry: Registry | None = None) -> Settings:
    """The settings of the config ``name`` (a path or a packaged config), changed by ``key.of.it=value`` overrides.

    Raises ConfigError with every problem found.
    """
    path = find_config(name)
    values = read_mapping(path)
    for override in overrides:
        _override(values, override)
    return parse_settings(values, registry=registry, where=path.name)


def parse_settings(values: Mapping[str, Any], *, registry: Registry | None = None, where: str = "config") -> Settings:
    """The settings of plain values, as a YAML file gives them. Raises ConfigError with every problem."""
    registry = registry or default_registry()
    values = dict(values)
    conflicts = _take_from_flat_block(values, where)
    _take_from_adapter(values)
    values = {key: value for key, value in values.items() if key not in IGNORED}
    problems = [_unknown(key, where) for key in values if key not in RunConfig.model_fields.keys() | MODEL_KEYS]
    problems += conflicts
    if "host" in values and "moshi_paths" in values:
        problems.append(f"{where}: 'host' and 'moshi_paths' both say which Moshi: leave one of them out.")
    run = ttt = None
    try:
        run = parse_model(RunConfig, {key: values[key] for key in values if key in RunConfig.model_fields}, where)
    except ConfigError as error:
        problems.append(str(error))
    model = {key: values[key] for key in MODEL_KEYS if values.get(key) is not None}
    try:
        model.setdefault("host", _host(values, where))
        model.setdefault("ttt", [])  # LoRA, or everything, without blocks
        ttt = parse_config({**model, "seed": values.get("seed", 0)}, registry=registry, where=where)
    except ConfigError as error:
        problems += [line for line in str(error).splitlines() if line not in "\n".join(problems)]
    if problems or run is None or ttt is None:
        if not values.keys() >= {"data", "run_dir"}:
            problems.append(
                f"{where}: a training run needs recordings and a folder to write. Add `data: {{train_data: ...}}` and "
                "`run_dir: ...` (the packaged config train-cpu has both), or give data.train_data=... run_dir=..."
            )
        raise ConfigError("\n".join(problems))
    host = ttt.host
    if not isinstance(host, MoshiHostConfig):
        raise ConfigError(f"{where}: host: training is written for the host 'moshi', got {host.name!r}.")
    if not (ttt.ttt or run.lora.enable or run.full_finetuning):
        raise ConfigError(
            f"{where}: there is nothing to train. Add an entry to ttt, set lora.enable, or set full_finetuning."
        )
    if host.dtype not in (None, run.param_dtype) and "param_dtype" in values:
        raise ConfigError(f"{where}: host.dtype is {host.dtype} and param_dtype {run.param_dtype}: leave one out.")
    if host.dtype is None:
        host = host.model_copy(update={"dtype": run.param_dtype})
    return Settings(ttt=ttt.model_copy(update={"host": host}), run=run, host=host)


def _unknown(key: Any, where: str) -> str:
    if key == "train":
        return (
            f"{where}: the section 'train' is of an earlier version of the quickstart's config. `moshi-ttt quickstart "
            "--config` reads it, and shows the keys that replace it."
        )
    return f"{where}: unknown key {key!r}. {nearest(str(key), [*RunConfig.model_fields, *MODEL_KEYS])}"


def _host(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        paths = parse_model(MoshiPaths, values.get("moshi_paths") or {}, f"{where}: moshi_paths")
    except ConfigError:  # what is wrong with them is reported with the rest of the run
        paths = MoshiPaths()
    files = {ours: path for theirs, ours in REPLACED.items() if (path := getattr(paths, theirs))}
    repository = paths.hf_repo_id
    if repository is None:
        local = files.get("config_path") or files.get("moshi_weights")
        if local is None:
            raise ConfigError(
                f"{where}: moshi_paths.hf_repo_id is null, and neither config_path nor moshi_path says where the model "
                f"is. Give them, or leave hf_repo_id out for {DEFAULT_REPO}."
            )
        repository = str(Path(local).parent)
    return {"name": "moshi", "hf_repo": repository, **files}


def _take_from_flat_block(values: dict[str, Any], where: str) -> list[str]:
    """Give the run what the flat ``ttt`` block says of it; a sentence for each option that the run says otherwise.

    Of its inner losses, which decide no numbers, what the run says counts.
    """
    flat, problems = values.get("ttt"), []
    if not isinstance(flat, Mapping) or False in (flat.get("enable"), flat.get("enabled")):
        return []
    for theirs, ours in FLAT.items():
        if flat.get(theirs) is not None and values.setdefault(ours, flat[theirs]) != flat[theirs]:
            problems.append(
                f"{where}: {ours} is {values[ours]!r}, and ttt.{theirs} is {flat[theirs]!r}. They are one option: "
                "leave one out."
            )
    found: dict[str, Any] = {}
    for theirs, ours in INNER_LOSSES.items():
        if flat.get(theirs) is not None:
            found[ours] = found.get(ours) or flat[theirs]  # two of its keys enable them
    own = values.get("inner_losses")
    if found and isinstance(own, Mapping | None):
        values["inner_losses"] = {**found, **(own or {})}
    return problems


def _take_from_adapter(values: dict[str, Any]) -> None:
    """Take blocks and precision from the adapter that training starts from, where the config leaves them out."""
    adapter = values.get("adapter")
    if isinstance(adapter, str) and adapter and values.get("ttt") is None:
        found = adapter_entries(find_adapter(adapter))
        values["ttt"] = found["ttt"]
        values.setdefault("precision", found["precision"])


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{override!r} is no override: write key=value, as in optim.lr=1e-5 or ttt.0.chunk=32.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML.") from None
    place: Any = values
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"{override!r}: {'.'.join(parts[:index])} is a list of {len(place)}, not {part!r}.")
            if last:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif not isinstance(place, dict):
            raise ConfigError(f"{override!r}: {'.'.join(parts[:index])} is {place!r}, which has nothing inside.")
        elif last:
            place[part] = value
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]


def write_settings(settings: Settings, path: Path) -> None:
    """The run as a config that runs again: every option, defaults included, and no secret."""
    values = settings.run.model_dump(mode="json", exclude={"moshi_paths": True, "wandb": {"key"}})
    values |= settings.ttt.model_dump(mode="json", include={"host", "precision", "ttt"})
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
