"""Numbers as people read them."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """``1.25 MiB``; exact numbers are in the JSON."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"


def human_count(count: int) -> str:
    """``3.21 M``."""
    size = float(count)
    for unit in ("", " k", " M", " G"):
        if size < 1000 or unit == " G":
            break
        size /= 1000
    return f"{size:,.0f}" if unit == "" else f"{size:,.2f}{unit}"
