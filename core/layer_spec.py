"""Layer specifications: which layers of a host a config entry means.

Grammar, over layers ``0 .. n-1``; parts are joined by commas:

    none  all  middle (n//4 .. 3n//4 - 1)  first:N  last:N  every:N  every:N@START  7  -1  8-15  -4--1
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moshi_ttt.core.errors import LayerSpecError

GRAMMAR = "none, all, middle, first:N, last:N, every:N, every:N@START, an index like 7 or -1, a range like 8-15"


def resolve_layers(specification: str | int | Iterable[int], num_layers: int) -> tuple[int, ...]:
    """The layers that ``specification`` selects in a host of ``num_layers``, ascending.

    Raises:
        LayerSpecError: not in the grammar, out of range, selects nothing (unless ``none``), or a layer twice.
    """
    if isinstance(specification, int):
        specification = str(specification)
    elif not isinstance(specification, str):
        specification = ",".join(str(index) for index in specification)
    parts = [part.strip() for part in specification.split(",")]
    if parts == ["none"]:
        return ()
    claimed: dict[int, str] = {}
    for part in parts:
        selected = _resolve_part(part, num_layers, specification)
        if not selected:
            raise LayerSpecError(f"Layers {specification!r}: {part!r} selects none of the {num_layers} layers.")
        for layer in selected:
            if layer in claimed:
                raise LayerSpecError(
                    f"Layers {specification!r}: layer {layer} is claimed twice, by {claimed[layer]!r} and {part!r}. "
                    f"The layers are 0 to {num_layers - 1}."
                )
            claimed[layer] = part
    return tuple(sorted(claimed))


def _resolve_part(part: str, n: int, whole: str) -> range:
    if part == "all":
        return range(n)
    if part == "middle":
        return range(n // 4, 3 * n // 4)
    if match := re.fullmatch(r"(first|last):(\d+)", part):
        count = _count(match[2], part, n, whole)
        return range(count) if match[1] == "first" else range(n - count, n)
    if match := re.fullmatch(r"every:(\d+)(?:@(\d+))?", part):
        step = _count(match[1], part, n, whole)
        return range(_index(match[2] or "0", part, n, whole), n, step)
    if match := re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part):
        first = _index(match[1], part, n, whole)
        last = _index(match[2], part, n, whole) if match[2] is not None else first
        if last < first:
            raise LayerSpecError(
                f"Layers {whole!r}: the range {part!r} runs backwards ({first} to {last}); the layers are 0 to {n - 1}."
            )
        return range(first, last + 1)
    extra = " 'none' stands alone." if part == "none" else ""
    raise LayerSpecError(f"Layers {whole!r}: cannot read {part!r}.{extra} Allowed: {GRAMMAR}; joined by commas.")


def _index(text: str, part: str, n: int, whole: str) -> int:
    index = int(text)
    if not -n <= index < n:
        raise LayerSpecError(
            f"Layers {whole!r}: {part!r} is out of range; the layers are 0 to {n - 1} (or -{n} to -1 from the end)."
        )
    return index % n


def _count(text: str, part: str, n: int, whole: str) -> int:
    count = int(text)
    if not 1 <= count <= n:
        raise LayerSpecError(f"Layers {whole!r}: {part!r} needs a number from 1 to {n}; the layers are 0 to {n - 1}.")
    return count
