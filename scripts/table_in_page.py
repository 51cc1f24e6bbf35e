"""A table of figures that a script writes into a page of the documentation, between two marks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class TableInPage:
    """Where a table stands.

    Attributes:
        name: of the table, in its marks: ``<!-- NAME: written by scripts/SCRIPT -->`` and ``<!-- end of NAME -->``.
        script: the file in ``scripts/`` that writes it.
        page: the Markdown file.
    """

    name: str
    script: str
    page: Path = DOCS / "gpu.md"

    def read(self) -> str:
        """The text between the marks. Raises ValueError where the page does not have each mark once, in this order."""
        return self._parts()[1]

    def write(self, made: str) -> None:
        """Replace the text between the marks by ``made``, whole lines. Raises ValueError as ``read`` does."""
        before, _, after = self._parts()
        begin, end = self._marks()
        self.page.write_text(before + begin + made + end + after, encoding="utf-8")

    def rows(self) -> dict[str, list[str]]:
        """The first cell of each row -> its others, without the heading and the line under it."""
        lines = self.read().strip().splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {name: others for name, *others in cells}

    def _marks(self) -> tuple[str, str]:
        return f"<!-- {self.name}: written by scripts/{self.script} -->\n", f"<!-- end of {self.name} -->\n"

    def _parts(self) -> tuple[str, str, str]:
        text = self.page.read_text(encoding="utf-8")
        begin, end = self._marks()
        before, *rest = text.split(begin)
        inside, *after = rest[0].split(end) if len(rest) == 1 else ("",)
        if len(after) != 1 or end in before:
            raise ValueError(
                f"{self.page} has to have the marks of the table {self.name!r} once each, in this order: "
                f"{begin.strip()} and {end.strip()}"
            )
        return before, inside, after[0]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def print_or_write(where: TableInPage, table: Callable[[], str], about: str | None) -> None:
    """The program of such a script: it prints its table, and writes it with ``--write``. ``about`` is its docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{where.page.name}")
    options = parser.parse_args()
    made = table()
    if options.write:
        where.write(made)
    print(made, end="")
