"""Every key of every config, from the models that validate them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Models = list[tuple[str, type[BaseModel]]]
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")
"""A line of ``Attributes:`` that begins with the names of one or more keys."""


def configuration() -> str:
    """A table of keys for each model: a config's top level, hosts, variants, a training run, and what is inside."""
    parts = [_section(title, model) for title, model in config_models()]
    return "\n".join(parts)


@cache
def config_models() -> Models:
    """Each model that a user writes in YAML, under the title of its section; every variant that is registered."""
    from moshi_ttt.configs.training import RunConfig
    from moshi_ttt.core.config import TTTConfig
    from moshi_ttt.core.registry import default_registry

    registry = default_registry()
    found: Models = [("A config of a model", TTTConfig)]
    for entry in registry.entries():
        if entry.kind == "host":
            found.append((f"host: {entry.name}", registry.host(entry.name).config_class))
    for entry in registry.entries():
        if entry.kind == "block":
            found.append((f"variant: {entry.name}", entry.load_config()))
    found.append(("A training run", RunConfig))
    seen = {model for _, model in found}
    waiting = [model for _, model in found]
    while waiting:
        for name, inner in _inner_models(waiting.pop(0)):
            if inner not in seen and inner.model_fields:
                seen.add(inner)
                waiting.append(inner)
                found.append((name, inner))
    return found


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model and its bases say of each key, under ``Attributes:``."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        _, _, text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        names: list[str] = []
        for line in text.splitlines():
            match = ENTRY.match(line)
            if match is not None:
                names = match[1].split(", ")
                found.update(dict.fromkeys(names, match[2]))
            elif line.startswith(" " * 8):
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
            elif line.strip():
                break  # the docstring's next section
    return found


def _inner_models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            if inner.__name__ not in ("HostConfig", "BlockConfig", "FrozenConfig"):  # open: their kinds are listed
                yield name, inner


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _section(title: str, model: type[BaseModel]) -> str:
    said = descriptions(model)
    summary, _, _ = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:")
    lines = [f"## {title}", "", summary.strip(), "", "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        lines.append(f"| `{name}` | {_kind(field)} | {_default(field)} | {_cell(said.get(name, ''))} |")
    return "\n".join([*lines, ""])


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(limit, name, None) is not None
    ]
    return _cell(", ".join([_type(field.annotation), *bounds]))


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "`null`"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    inner = list(get_args(annotation))
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return " or ".join(dict.fromkeys(_type(each) for each in inner))
    if inner:  # Annotated
        return _type(inner[0])
    return {"int": "integer", "float": "number", "bool": "`true` or `false`", "str": "text"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "[below](#" + _anchor_of(field) + ")" if _anchor_of(field) else ""
    if isinstance(value, (tuple, dict)) and not value:
        return "empty"
    if isinstance(value, Path):
        value = str(value)
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _anchor_of(field: FieldInfo) -> str:
    for title, model in config_models():
        if model in set(_models_in(field.annotation)):
            return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    return ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
