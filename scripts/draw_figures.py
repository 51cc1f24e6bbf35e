#!/usr/bin/env python3
"""Draw the figures of the documentation, as SVG files that follow the reader's light or dark mode.

    python scripts/draw_figures.py docs/figures             # from docs/study/metrics.json and measured files
    python scripts/draw_figures.py docs/figures --measure   # measures first, some minutes on a CPU

The same inputs and the same matplotlib give the same bytes. Colors are those of every other figure of the package
(Okabe and Ito's), and no figure needs color alone to be read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from figure_curves import draw_inner_loop, draw_position, draw_recall
from figure_diagrams import draw_architecture, draw_chunk
from figure_ink import FAINT, INK
from matplotlib.figure import Figure

from moshi_ttt.system.report.figures import AMBER, BLUE, GREY, ORANGE, SKY

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "docs" / "study" / "metrics.json"
MEASURED = ("inner-loop", "position")
"""Figures that are drawn from a measured file beside them, NAME.json."""
COLORS = {
    INK: ("ink", "#24292f", "#e6edf3"),
    FAINT: ("faint", "#d0d7de", "#57606a"),
    BLUE: ("blue", BLUE, SKY),
    ORANGE: ("orange", ORANGE, AMBER),
    GREY: ("grey", GREY, "#a0a6ad"),
}
"""Color in a figure -> its name, and what it is on light and on dark paper."""
DETERMINISTIC = {"svg.hashsalt": "moshi-ttt", "svg.fonttype": "path", "font.family": "DejaVu Sans"}


def figures(folder: Path, study: Path = STUDY) -> dict[str, Callable[[], Figure]]:
    """Name of each figure -> what draws it."""
    read: Callable[[Path], Any] = lambda path: json.loads(path.read_text(encoding="utf-8"))  # noqa: E731
    return {
        "architecture": draw_architecture,
        "chunk": draw_chunk,
        "recall": lambda: draw_recall(read(study)),
        "position": lambda: draw_position(read(folder / "position.json")),
        "inner-loop": lambda: draw_inner_loop(read(folder / "inner-loop.json")),
    }


def svg(figure: Figure) -> str:
    """The figure as SVG, without a date, with ink and paper of the reader's mode."""
    buffer = io.StringIO()
    with matplotlib.rc_context(DETERMINISTIC):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    for color, (name, _, _) in COLORS.items():
        text = text.replace(color.lower(), f"var(--{name})")
    light, dark = (";".join(f"--{each[0]}:{each[place]}" for each in COLORS.values()) for place in (1, 2))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    return "\n".join(line.rstrip() for line in f"{text[:start]}{style}{text[start:]}".splitlines()) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the figures go, and where the measured files are")
    parser.add_argument("--measure", action="store_true", help="measure again what is drawn from measured files")
    parser.add_argument("--only", choices=sorted(figures(ROOT)), help="draw one figure alone")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.measure:
        from figure_measurements import measure

        for name in MEASURED:
            if given.only in (None, name):
                text = json.dumps(measure(name), indent=1, sort_keys=True)
                (given.folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    for name, draw in figures(given.folder).items():
        if given.only in (None, name):
            (given.folder / f"{name}.svg").write_text(svg(draw()), encoding="utf-8")
            print(given.folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
