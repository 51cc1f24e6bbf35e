"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def human_bytes(count: int) -> str:
    """``1.25 MiB``; exact numbers are in the JSON."""
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB"))


def human_count(count: int) -> str:
    """``3.21 M``."""
    return _scaled(count, 1000, ("", " k", " M", " G"))


def _scaled(count: int, base: int, units: Sequence[str]) -> str:
    """The count in the first unit in which it is below ``base``, or in the last one."""
    size, place = float(count), 0
    while size >= base and place < len(units) - 1:
        size, place = size / base, place + 1
    return f"{size:,.2f}{units[place]}" if place else f"{size:,.0f}{units[0]}"
