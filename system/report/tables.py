"""Markdown: tables, images, lists of facts, and the format of a number with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moshi_ttt.system.report.writer import versions


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> list[str]:
    """The lines of a table. ``align`` has ``l`` or ``r`` for each column; by default all but the first are ``r``.

    Raises ValueError where a row does not have as many cells as ``header``.
    """
    align = align or "l" + "r" * (len(header) - 1)
    marks = {"l": "---", "r": "---:"}
    lines = [_row(header), _row([marks[letter] for letter in align])]
    for row in rows:
        if len(row) != len(header) or len(row) != len(align):
            raise ValueError(f"A row has {len(row)} cells, the header {len(header)}, the alignment {len(align)}.")
        lines.append(_row([cell.replace("|", "\\|") for cell in row]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"|{''.join(f' {cell} |' if cell else ' |' for cell in cells)}"


def image(text: str, file: str) -> list[str]:
    """A figure, with an empty line after it."""
    return [f"![{text}]({file})", ""]


def show(value: float, digits: int = 4, *, sign: bool = False, scale: float = 1.0) -> str:
    """``scale * value`` with so many digits after the point; empty where it is not finite."""
    return f"{scale * value:{'+' * sign}.{digits}f}" if math.isfinite(value) else ""


def show_interval(
    value: float, low: float, high: float, digits: int = 4, *, sign: bool = False, scale: float = 1.0
) -> str:
    """``value (low to high)`` as ``show`` writes each; without brackets where the bounds are not finite."""
    shown = [show(each, digits, sign=sign, scale=scale) for each in (value, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})" if all(shown) else shown[0]


def fact_lines(facts: Mapping[str, Any], recordings: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The list at the head of a report: where the figures come from, and which recordings are left out."""
    lines = [f"- {name}: {value}" for name, value in facts.items() if name != "subjects"]
    lines += [f"- {name}: {about}" for name, about in facts.get("subjects", {}).items()]
    lines.append(f"- recordings: {len(recordings)}")
    if left_out:
        lines.append(f"- left out, too short: {', '.join(left_out)}")
    return [*lines, f"- {version_text()}", ""]


def version_text() -> str:
    """``moshi-ttt 0.1.0, moshi 0.2.13, torch 2.9.1``."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())
