"""metrics.json with every number, report.md with the tables, and which versions computed them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from moshi_ttt.system.output_folder import METRICS

REPORT = "report.md"


def versions() -> dict[str, str]:
    """The versions of what computes the figures, by the name of the distribution."""
    return {name: version(name) for name in ("moshi-ttt", "moshi", "torch")}


def number(value: float) -> float | None:
    """``value``; None where it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def numbers(values: Tensor | Sequence[float]) -> list[float | None]:
    """``number`` of each of ``values [N]``."""
    return [number(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]


def write_metrics(folder: Path, values: Mapping[str, Any]) -> None:
    """``metrics.json``. Raises ValueError for a number that is not finite: ``number`` makes it null."""
    (folder / METRICS).write_text(to_json(values) + "\n", encoding="utf-8")


def write_report(folder: Path, values: Mapping[str, Any], lines: Iterable[str]) -> None:
    """``metrics.json`` of ``values``, and ``report.md`` of ``lines``."""
    write_metrics(folder, values)
    (folder / REPORT).write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")


def to_json(value: Any, indent: str = "") -> str:
    """JSON that can be read and compared line by line: a key a line, but a list of plain values is one line.

    Raises ValueError for a number that is not finite.
    """
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        parts = [f"{inner}{json.dumps(_key(key))}: {to_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return "[\n" + ",\n".join(inner + to_json(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"A key of {METRICS} is {key!r}. Give a str.")
    return key
