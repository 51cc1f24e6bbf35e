"""The code in the documents: where it is, what language it is in, why it may not run here, and how it is run.

A block in a fence runs in CI, in the order of its page, in one folder for the page (``world.py`` says what lies there).

- ``python`` is executed; blocks of one page share their names.
- ``bash`` is run command by command: ``moshi-ttt`` and ``python`` in this process, at the sizes of ``sizes.py``.
- ``yaml``, ``toml`` and ``json`` are read, and a config is validated.
- A block with a title, as in ```` ```yaml title="my.yaml" ````, is written to that file, for the commands after it;
  a second block with that title continues the file.
- A block after ``<!-- not run: REASON -->`` is not run; its commands must still exist, with all their options.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.project import ROOT

LANGUAGES = ("python", "bash", "yaml", "toml", "json", "text", "bibtex", "")
REASONS = (
    "a server, which runs until it is stopped",
    "needs a data set that others publish",
    "needs a GPU",
    "needs several processes or machines",
    "needs the network",
    "takes minutes or hours",
)
"""Why a block may not run here. Or ``tests/... runs it``, a file that is there."""
FENCE = re.compile(r"^( *)(`{3,})(\w*)(?: +(.*))?$")
MARKER = re.compile(r"^ *<!-- not run: (.+) -->$")
TITLE = re.compile(r'title="([^"]+)"')
COMMANDS = ("moshi-ttt", "python", "make", "pip", "pytest", "torchrun")
"""The programs that an indented block of code begins with where it is one of commands."""


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A block of code of a page; ``line`` is that of its fence, from 1."""

    page: str
    line: int
    language: str
    title: str | None
    not_run: str | None
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def documents() -> list[Path]:
    """Every document that a reader is sent to. (`new-plugin` writes another; its own tests run what it says.)"""
    folders = ("docs", "plugins")
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def snippets(path: Path) -> list[Snippet]:
    """The blocks of a document, in order: those in fences, and indented ones that are commands."""
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    found: list[Snippet] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    index, marker = 0, None
    while index < len(lines):
        line = lines[index]
        if (match := MARKER.match(line)) is not None:
            marker = match[1]
        elif (fence := FENCE.match(line)) is not None:
            start, (indent, ticks) = index, (fence[1], fence[2])
            index += 1
            while lines[index].strip() != ticks:
                index += 1
            code = "\n".join(each.removeprefix(indent) for each in lines[start + 1 : index]) + "\n"
            title = TITLE.search(fence[4] or "")
            found.append(
                Snippet(
                    page=page, line=start + 1, language=fence[3], title=title and title[1], not_run=marker, code=code
                )
            )
            marker = None
        elif line.strip():
            if re.match(rf"    (?:{'|'.join(COMMANDS)}) ", line) and not lines[index - 1].strip():
                start = index
                while index + 1 < len(lines) and lines[index + 1].startswith("    "):
                    index += 1
                code = "\n".join(each[4:] for each in lines[start : index + 1]) + "\n"
                found.append(Snippet(page=page, line=start + 1, language="bash", title=None, not_run=marker, code=code))
            marker = None
        index += 1
    return found


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without comments; lines that end in a backslash are joined."""
    joined = re.sub(r"\\\n\s*", " ", code)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def inline_commands(path: Path) -> Iterator[list[str]]:
    """The words of each command that a document names in a line of text, as in ``moshi-ttt explain CONFIG``."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r"(?<!`)`((?:moshi-ttt|make|python) [^`]+)`(?!`)", text):
        yield shlex.split(" ".join(found.split()))
