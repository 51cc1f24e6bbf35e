"""Markdown as a code host reads it, rewritten for Python-Markdown, which mkdocs uses."""

from __future__ import annotations

import re

ITEM = re.compile(r"^( *)([-*+]|\d+\.) +")
WIDTH = 4
"""Blanks by which Python-Markdown indents what belongs to an item of a list."""


def normalized(text: str) -> str:
    """Lists with an empty line before them, and what belongs to an item indented by four blanks a level.

    Code in fences is left as it is, but for the indentation of the item that it belongs to.
    """
    out: list[str] = []
    items: list[int] = []  # columns at which the content of the open items begins
    fence = ""
    for line in text.splitlines():
        stripped, indent = line.lstrip(), len(line) - len(line.lstrip())
        if fence:
            out.append(_indented(line, items))
            if stripped.startswith(fence):
                fence = ""
            continue
        if not stripped:
            out.append("")
            continue
        match = ITEM.match(line)
        if match is None or not _opens(indent, items):
            while items and indent < items[-1] and out[-1] == "":
                items.pop()
            out.append(_indented(line, items))
            if stripped.startswith("```"):
                fence = stripped[: len(stripped) - len(stripped.lstrip("`"))]
            continue
        while items and indent < items[-1]:
            items.pop()
        if not items and out and out[-1] and not ITEM.match(out[-1]) and not out[-1].startswith(" "):
            out.append("")
        out.append(" " * (WIDTH * len(items)) + stripped)
        items.append(len(match[0]))
    return "\n".join(out) + "\n"


def _opens(indent: int, items: list[int]) -> bool:
    """Whether a line that looks like an item is one: code that is indented by four blanks is not."""
    return indent < WIDTH if not items else indent < items[-1] + WIDTH


def _indented(line: str, items: list[int]) -> str:
    if not items:
        return line
    column = items[-1]
    indent = len(line) - len(line.lstrip())
    return " " * (WIDTH * len(items)) + line[min(indent, column) :]
