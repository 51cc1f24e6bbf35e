"""The pages: links lead to a heading that is there, tables of figures name their command, lists read the same twice."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.docs.snippets import documents
from tests.project import ROOT

PAGES = [path for path in documents() if "study" not in path.parts]
HEADING = re.compile(r"^(#{1,6}) (.+?)\s*$")
FIGURE = re.compile(r"^\W{0,3}\d[\d.,]*(?:e-?\d+)?\b")
COMMAND = re.compile(
    r"`(?:make|moshi-ttt|python|pytest) |^ {0,4}(?:OMP\S+ )?(?:make|moshi-ttt|python|pytest) ", re.MULTILINE
)
MACHINE = re.compile(r"\bcores?\b|\bCPU|H100|H200|\bGPU|\bmachine\b|counted|\bparameters\b")


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^( *)(`{3,}).*?^ *\2$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    lines = without_code(path.read_text(encoding="utf-8")).splitlines()
    return {slug(match[2]) for line in lines if (match := HEADING.match(line))}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_a_file_and_a_heading(path):
    text = without_code(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if ":" in name:
            continue
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), f"{path.name} links to {target}"
        if anchor and found.suffix == ".md" and found.parent.name != "reference":
            assert anchor in anchors(found), f"{path.name} links to {target}: {found.name} has no such heading"


def test_every_page_of_the_site_is_in_its_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"([\w/.-]+\.md)$", nav, flags=re.MULTILINE)) - {"index.md"}
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {name for name in named if not name.startswith("repository/")} == pages


# ---- tables of figures


def sections(text: str) -> list[tuple[list[str], str]]:
    """Each section's headings from the page's title down, and its own text."""
    found: list[tuple[list[str], str]] = []
    open_headings: list[tuple[int, str]] = []
    own: list[str] = []
    fence = False
    for line in [*text.splitlines(), "# end"]:
        fence ^= line.lstrip().startswith("```")
        match = None if fence else HEADING.match(line)
        if match is None:
            own.append(line)
            continue
        found.append(([name for _, name in open_headings], "\n".join(own)))
        own = []
        open_headings = [each for each in open_headings if each[0] < len(match[1])] + [(len(match[1]), match[2])]
    return found


def has_figures(text: str) -> bool:
    """Whether a section has a table most of whose cells, but for the first column, are numbers."""
    for table in re.findall(r"(?:^ *\|.*\n)+", text + "\n", flags=re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|"))[1:] for line in table.splitlines()[2:]]
        cells = [cell.strip() for row in rows for cell in row if cell.strip()]
        if cells and sum(bool(FIGURE.match(cell)) for cell in cells) > len(cells) / 2:
            return True
    return False


def lacking_source(text: str) -> list[str]:
    """The sections whose tables of figures have no command, or no machine or model, in them or in those around them."""
    found = sections(text)
    lacking = []
    for headings, own in found:
        if has_figures(own):
            around = "\n".join(said for names, said in found if headings[: len(names)] == names)
            lacking += [
                f"{' > '.join(headings)} names no {what}"
                for what, pattern in (("command", COMMAND), ("machine or model", MACHINE))
                if not pattern.search(around)
            ]
    return lacking


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tables_of_figures_name_their_command_and_machine(path):
    assert lacking_source(path.read_text(encoding="utf-8")) == []


def test_a_table_without_a_command_is_found():
    table = "# A\n\n{}\n\n## B\n\n| | ms |\n| --- | ---: |\n| x | 1.5 |\n"
    assert lacking_source(table.format("text")) == ["A > B names no command", "A > B names no machine or model"]
    assert lacking_source(table.format("`make x`, two cores")) == []
    assert lacking_source("# A\n\n`make x` on a CPU\n\n# C\n\n" + "| | ms |\n| --- | --- |\n| x | 2 |\n") == [
        "C names no command", "C names no machine or model",
    ]  # fmt: skip


# ---- markdown for the site


@pytest.fixture(scope="module")
def normalized():
    folder = str(ROOT / "scripts" / "docs_site")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("markdown_text").normalized
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Text:\n- a\n  more\n- b\n", "Text:\n\n- a\n    more\n- b\n"),
        ("- a\n  - b\n    more\n- c\n\nText\n", "- a\n    - b\n        more\n- c\n\nText\n"),
        ("1. a\n\n   ```bash\n     x\n   ```\n\nText\n", "1. a\n\n    ```bash\n      x\n    ```\n\nText\n"),
        ("- a\n\n  | t |\n  | - |\n\nText\n", "- a\n\n    | t |\n    | - |\n\nText\n"),
        ("Text\n\n    code - a\n    - not a list\n", "Text\n\n    code - a\n    - not a list\n"),
        ("```text\n- a\n  b\n```\n", "```text\n- a\n  b\n```\n"),
    ],
)
def test_lists_are_written_as_python_markdown_reads_them(normalized, text, expected):
    assert normalized(text) == expected
