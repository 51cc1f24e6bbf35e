#!/usr/bin/env python3
"""Check the built site: it refers to nothing outside, its links and anchors lead somewhere, search has every page.

    python scripts/docs_site/check.py build/site

Links to other sites are allowed; what a browser would fetch by itself is not. Exit code 1, with a line for each
problem.
"""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
"""Tag -> the attribute whose address a browser fetches by itself."""
FETCHED_LINKS = ("stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch")


class PageLinks(HTMLParser):
    """What a page fetches, where it leads, and the anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag in FETCHED and (address := given.get(FETCHED[tag])):
            self.fetched.append(address)
        if tag == "link" and (address := given.get("href")) and given.get("rel") in FETCHED_LINKS:
            self.fetched.append(address)
        if tag == "a" and (address := given.get("href")):
            self.links.append(address)


def problems(site: Path) -> list[str]:
    """A line for each address that leads outside or nowhere, and for what the search index lacks."""
    pages = {path: PageLinks() for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name} fetches {each}" for each in page.fetched if urlsplit(each).netloc]
        if name == "404.html":  # its addresses begin at the site's root
            continue
        for each in [*page.fetched, *page.links]:
            address = urlsplit(each)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{name} leads to {each}, which is not there")
            elif target in pages and address.fragment and unquote(address.fragment) not in pages[target].anchors:
                found.append(f"{name} leads to {each}, and there is no such anchor")
    for path in sorted(site.rglob("*.css")):
        for each in re.findall(r"(?:url\(|@import\s+)[\"']?(https?:[^\"')]+)", path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)} fetches {each}")
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    searched = {entry["location"].partition("#")[0] for entry in index["docs"]}
    found += [
        f"the search index lacks {path.relative_to(site).as_posix()}"
        for path in pages
        if path.relative_to(site).as_posix() not in searched | {"404.html"}
    ]
    return found


def main() -> int:
    site = Path(sys.argv[1])
    found = problems(site)
    print(
        "\n".join(found) or f"{len(list(site.rglob('*.html')))} pages: every link leads somewhere, nothing is fetched."
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
