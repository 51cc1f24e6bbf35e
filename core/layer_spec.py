"""Layer specifications: which layers of a host a config entry means.

Grammar, over layers ``0 .. n-1``; parts are joined by commas:

    none  all  middle (n//4 .. 3n//4 - 1)  first:N  last:N  every:N  every:N@START  7  -1  8-15  -4--1

Words count over the layers that have a site of the block's kind: where only layers 1, 3 and 5 have a gated MLP,
``last:2`` of such a block means 3 and 5. Numbers are those of layers, wherever a site is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moshi_ttt.core.errors import LayerSpecError

GRAMMAR = "none, all, middle, first:N, last:N, every:N, every:N@START, an index like 7 or -1, a range like 8-15"


def resolve_layers(
    specification: str | int | Iterable[int], num_layers: int, available: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The layers that ``specification`` selects in a host of ``num_layers``, ascending.

    Args:
        specification: see the module.
        num_layers: of the host.
        available: the layers that words count over, ascending; all of them by default.

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
    places = range(num_layers) if available is None else available
    claimed: dict[int, str] = {}
    for part in parts:
        selected = _resolve_word(part, places, specification)
        if selected is None:
            selected = _resolve_numbers(part, num_layers, specification)
        if not selected:
            raise LayerSpecError(f"Layers {specification!r}: {part!r} selects none of the {len(places)} layers.")
        for layer in selected:
            if layer in claimed:
                raise LayerSpecError(
                    f"Layers {specification!r}: layer {layer} is claimed twice, by {claimed[layer]!r} and {part!r}. "
                    f"The layers are 0 to {num_layers - 1}."
                )
            claimed[layer] = part
    return tuple(sorted(claimed))


def _resolve_word(part: str, places: Sequence[int], whole: str) -> Sequence[int] | None:
    """The layers of ``places`` that a part in words selects; None for a part in numbers."""
    n = len(places)
    if part == "all":
        return places
    if part == "middle":
        return places[n // 4 : 3 * n // 4]
    if match := re.fullmatch(r"(first|last):(\d+)", part):
        count = _count(match[2], part, places, whole)
        return places[:count] if match[1] == "first" else places[n - count :]
    if match := re.fullmatch(r"every:(\d+)(?:@(\d+))?", part):
        step, start = _count(match[1], part, places, whole), int(match[2] or "0")
        if start >= n:
            raise LayerSpecError(f"Layers {whole!r}: {part!r} is out of range; {_listed(places)}.")
        return places[start::step]
    return None


def _resolve_numbers(part: str, n: int, whole: str) -> range:
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


def _count(text: str, part: str, places: Sequence[int], whole: str) -> int:
    count = int(text)
    if not 1 <= count <= len(places):
        raise LayerSpecError(f"Layers {whole!r}: {part!r} needs a number from 1 to {len(places)}; {_listed(places)}.")
    return count


def _listed(places: Sequence[int]) -> str:
    """The layers that words count over, for the end of a sentence."""
    if list(places) == list(range(len(places))):
        return f"the layers are 0 to {len(places) - 1}"
    return f"the layers with such a site are {', '.join(map(str, places))}"
