"""mkdocs calls this: pages that are files of the repository, pages that are made from the code, links between them.

A document may link to any file of the repository, as on a code host: the site has a page for each such file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference  # beside this file: mkdocs puts this folder on the path
from markdown_text import normalized
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[[^\]\n]*(?:\n[^\]\n]*)?\])\(([^)\s]+)\)")
"""A link or an image: text in brackets, over two lines at most, then the target."""
FENCE = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}
START = "README.md"
"""Of the repository: the start page."""
FOR_TESTS = re.compile(r"^ *<!-- not run: .* -->\n", flags=re.MULTILINE)
"""What tests/docs reads."""
PLACEHOLDER = re.compile(r"^<!-- generated: (\S+) -->$", flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, and a page for each file outside ``docs`` that a page links to, directly or not."""
    docs = Path(config.docs_dir)
    files.append(File.generated(config, "index.md", content=(ROOT / START).read_text(encoding="utf-8")))
    waiting = [ROOT / START, *sorted(docs.rglob("*.md")), *(ROOT / path for path in _in_nav(config.nav))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(docs) and path != ROOT / START:
            _add(files, config, path)
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            targets = (_target(path, match[2]) for match in LINK.finditer(text))
            waiting += [found for found in targets if found is not None and not found.is_relative_to(docs)]
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """What the generated parts are, lists as Python-Markdown reads them, and links to the pages of the site."""
    docs = Path(config.docs_dir)
    markdown = FOR_TESTS.sub("", PLACEHOLDER.sub(lambda match: reference.make(match[1]), markdown))
    here = _source(page.file.src_uri, docs)
    if here is None:
        return markdown

    def on_the_site(match: re.Match[str]) -> str:
        found = _target(here, match[2])
        if found is None:
            return match[0]
        _, mark, anchor = match[2].partition("#")
        return f"{match[1]}({_relative(_page(found, docs), page.file.src_uri)}{mark}{anchor})"

    return LINK.sub(on_the_site, normalized(markdown))


def _in_nav(nav: Any) -> list[str]:
    """The files of the repository that the navigation names."""
    if isinstance(nav, str):
        return [nav.removeprefix("repository/")] if nav.startswith("repository/") else []
    inner = nav.values() if isinstance(nav, dict) else nav
    return [path for entry in inner for path in _in_nav(entry)]


def _target(here: Path, link: str) -> Path | None:
    """The file that a link in ``here`` leads to; None for an address, an anchor, or what is not there."""
    path, _, _ = link.partition("#")
    if not path or ":" in path:
        return None
    found = (here.parent / path).resolve()
    return found if found.is_file() and found.is_relative_to(ROOT) else None


def _page(path: Path, docs: Path) -> str:
    """What the site calls a file of the repository."""
    if path == ROOT / START:
        return "index.md"
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return f"repository/{name}" if path.suffix in (".md", ".png") else f"repository/{name}.md"


def _source(page: str, docs: Path) -> Path | None:
    """The document of the repository that a page is; None for a page of code."""
    if page == "index.md":
        return ROOT / START
    if page.startswith("repository/"):
        path = ROOT / page.removeprefix("repository/")
        return path if path.is_file() else None
    return docs / page


def _relative(target: str, page: str) -> str:
    return "../" * page.count("/") + target


def _add(files: Files, config: Any, path: Path) -> None:
    name = _page(path, Path(config.docs_dir))
    if files.get_file_from_path(name) is not None:
        return
    if path.suffix == ".png":
        files.append(File.generated(config, name, content=path.read_bytes()))
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        title = path.relative_to(ROOT).as_posix()
        ticks = "`" * 4
        text = f"# {title}\n\n{ticks}{FENCE.get(path.suffix, 'text')}\n{text.rstrip()}\n{ticks}\n"
    files.append(File.generated(config, name, content=text))
