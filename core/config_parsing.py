"""From a YAML file or a mapping to a configuration, checked against what is registered.

The schema of a file is the union of what is registered: an unknown variant, host or key is an error that names the
nearest ones, and all mistakes of a file are reported at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moshi_ttt.core.config import DEFAULT_PRECISION, BlockConfig, FrozenConfig, HostConfig, Seed, TTTConfig, parse_model
from moshi_ttt.core.errors import ConfigError, nearest
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.registrar import split_name
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.text_files import read_text


def parse_config(
    values: Mapping[str, Any],
    *,
    registry: Registry | None = None,
    sections: Mapping[str, type[FrozenConfig]] | None = None,
    where: str = "config",
) -> TTTConfig:
    """A validated configuration from plain values.

    Args:
        values: what a YAML file holds: ``host``, ``precision``, ``seed``, ``ttt`` and the sections asked for. Where
            ``ttt`` is a mapping, the host reads it (``HostModel.entries_of_mapping``), with a warning that shows the
            entries.
        registry: decides which hosts, policies and variants exist; the process's registry by default.
        sections: further top-level sections and the models that validate them.
        where: what error messages call the source.

    Raises:
        ConfigError: with every problem found, one a line.
        PluginError: a variant or host is asked for whose plugin failed to load.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where}: expected a mapping with 'host' and 'ttt', got {values!r}. load_config reads a YAML file."
        )
    registry = registry or default_registry()
    sections = sections or {}
    allowed = {"host", "precision", "seed", "ttt", *sections}
    unknown = [key for key in values if key not in allowed]
    problems = [f"{where}: unknown key {key!r}. {nearest(str(key), allowed)}" for key in unknown]

    def attempt(parse: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return parse(*arguments, where)
        except ConfigError as error:
            problems.append(str(error))
            return None

    precision = attempt(_parse_precision, values.get("precision", DEFAULT_PRECISION), registry)
    seed = attempt(_parse_seed, values.get("seed", 0))
    host = attempt(_parse_host_entry, values.get("host"), registry)
    entries = values.get("ttt")
    if isinstance(entries, Mapping):
        # Without a host nothing can read it, and the host's own problem is listed already.
        entries = () if host is None else attempt(_read_mapping, entries, registry.host(host.name)) or ()
    if not isinstance(entries, list | tuple):
        problems.append(f"{where}: 'ttt' must be a list of entries, each with a variant, got {entries!r}.")
        entries = ()
    blocks = [attempt(_parse_block_entry, index, entry, registry) for index, entry in enumerate(entries)]
    extra = {name: attempt(_parse_section, name, model, values.get(name)) for name, model in sections.items()}
    if problems:
        raise ConfigError("\n".join(problems))
    return TTTConfig(host=host, precision=precision, seed=seed, ttt=tuple(blocks), extra=extra)


def _read_mapping(mapping: Mapping[str, Any], host: HostModel, where: str) -> list[dict[str, Any]]:
    if "variant" in mapping:
        raise ConfigError(
            f"{where}: 'ttt' is a list of entries: write it as `ttt: [{{variant: {mapping['variant']}, ...}}]`."
        )
    entries, message = host.entries_of_mapping(mapping, where)
    warnings.warn(message, stacklevel=4)
    return entries


def _parse_precision(name: Any, registry: Registry, where: str) -> str:
    try:
        return registry.policy(str(name)).name
    except ConfigError as error:
        raise ConfigError(f"{where}: precision: {error}") from None


def _parse_seed(value: Any, where: str) -> int:
    return parse_model(_Seed, {"seed": value}, where).seed


class _Seed(FrozenConfig):
    seed: Seed


def _parse_host_entry(value: Any, registry: Registry, where: str) -> HostConfig:
    return parse_host(value, registry=registry, where=f"{where}: host")


def _parse_block_entry(index: int, value: Any, registry: Registry, where: str) -> BlockConfig:
    return parse_block(value, registry=registry, where=f"{where}: ttt[{index}]")


def _parse_section(name: str, model: type[FrozenConfig], value: Any, where: str) -> FrozenConfig:
    if not isinstance(value, Mapping | None):
        allowed = ", ".join(model.model_fields)
        raise ConfigError(f"{where}: {name}: expected a mapping with some of {allowed}, got {value!r}.")
    return parse_model(model, value or {}, f"{where}: {name}")


def parse_host(value: Any, *, registry: Registry | None = None, where: str = "host") -> HostConfig:
    """One ``host`` entry, validated by the host's own model."""
    registry = registry or default_registry()
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"{where}: expected a mapping with a 'name', got {value!r}. Hosts: {', '.join(registry.names('host'))}."
        )
    try:
        value, asked = _named(value, "name")
        host = registry.host(asked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return parse_model(host.config_class, value, where)


def parse_block(value: Any, *, registry: Registry | None = None, where: str = "ttt") -> BlockConfig:
    """One ``ttt`` entry, validated by its variant's own model."""
    registry = registry or default_registry()
    if not isinstance(value, Mapping) or not isinstance(value.get("variant"), str):
        raise ConfigError(
            f"{where}: expected a mapping with a 'variant', got {value!r}. "
            f"Variants: {', '.join(registry.names('block'))}."
        )
    try:
        value, asked = _named(value, "variant")
        variant = registry.block(asked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return parse_model(variant.config_class, value, f"{where} ({value['variant']})")


def _named(value: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], str]:
    """An entry with its distribution apart from the name at ``key``, and what the registry is asked for.

    Raises ConfigError where the entry says two distributions.
    """
    distribution, plain = split_name(value[key])
    given = value.get("distribution")
    if distribution is None:
        return value, plain if given is None else f"{given}:{plain}"
    if given is not None and given != distribution:
        raise ConfigError(f"{key}: {value[key]!r} says another distribution than distribution: {given!r}. Say one.")
    return {**value, key: plain, "distribution": distribution}, value[key]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, with a key that occurs twice an error: plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(
    path: str | Path, *, registry: Registry | None = None, sections: Mapping[str, type[FrozenConfig]] | None = None
) -> TTTConfig:
    """Read and validate a YAML file. Raises ConfigError for a missing file, bad YAML, or bad contents."""
    return parse_config(read_mapping(path), registry=registry, sections=sections, where=Path(path).name)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, not validated. Raises ConfigError."""
    path = user_path(path)
    try:
        values = yaml.load(read_text(path), Loader=_UniqueKeyLoader)  # a SafeLoader
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the config {path}: {error}. Give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, Mapping):
        given = "an empty file" if values is None else type(values).__name__
        raise ConfigError(f"{path}: expected a mapping with 'host' and 'ttt', got {given}.")
    return dict(values)
