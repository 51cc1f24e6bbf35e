"""The figures of the documentation: drawn from what was measured, the same each time, in the reader's colors."""

from __future__ import annotations

import importlib
import json
import re
import sys

import matplotlib
import numpy as np
import pytest

from tests.project import ROOT

FOLDER = ROOT / "docs" / "figures"
NAMES = ("architecture", "chunk", "recall", "position", "inner-loop")


@pytest.fixture(scope="module")
def drawing():
    """The module that draws, imported from its folder."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("draw_figures")
    finally:
        sys.path.remove(folder)


@pytest.mark.first_by_default
@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_what_its_command_draws(drawing, name):
    shipped = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    drawn = drawing.svg(drawing.figures(FOLDER)[name]())
    assert drawn == drawing.svg(drawing.figures(FOLDER)[name]()), "not the same twice"
    if f"Matplotlib v{matplotlib.__version__}" not in shipped:
        pytest.skip("drawn by another version of matplotlib, which may lay it out differently")
    assert drawn == shipped, "make figures"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_follows_light_and_dark_mode_and_fetches_nothing(drawing, name):
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text
    body = text.partition("</style>")[2]
    assert "var(--ink)" in body
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", body)) <= set(), "a color that does not follow the mode"
    assert not re.findall(r'(?:href|src)="(?!#)', body)


def test_there_is_nothing_else_in_the_folder():
    measured = {f"{name}.json" for name in ("position", "inner-loop")}
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.svg" for name in NAMES} | measured


def test_recall_is_that_of_the_study(drawing):
    study = json.loads((ROOT / "docs" / "study" / "metrics.json").read_text(encoding="utf-8"))
    known, played_once, *_ = drawing.figures(FOLDER)["recall"]().axes
    arms = list(study["choices"]["arms"].values())
    assert [label.get_text().split(",\n")[0] for label in known.get_yticklabels()] == arms
    for axes, what in ((known, "gain, second"), (played_once, "played once, 48 to 959")):
        marks = {
            round(float(each.get_ydata()[0])): each.get_xdata()[0] for each in axes.lines if each.get_marker() == "o"
        }
        for row, arm in enumerate(arms):
            (found,) = [
                each for each in study["figures"]
                if (each["group"], each["arm"], each["condition"], each["what"]) == ("test", arm, "updates on", what)
                and each["volume"] == study["choices"]["volumes"][arm]
            ]  # fmt: skip
            assert marks[row] == found["value"]
            assert found["value"] == pytest.approx(
                np.mean([each for each in found["by_recording"] if each is not None])
            )


def test_every_table_of_the_study_is_in_its_report():
    """Tables of figures, by row: what the page shows is what the command wrote, but for a title and rounding."""
    folders = ROOT / "docs" / "study", ROOT / "docs" / "study" / "shipped"
    report = "".join((folder / "report.md").read_text(encoding="utf-8") for folder in folders)
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and re.search(r"\([+-]\d", line)]
    assert len(rows) > 20
    for row in rows:
        for figure in re.findall(r"[+-]\d\.\d+ \([+-]\d\.\d+ to [+-]\d\.\d+\)", row):
            assert figure in report, row


def test_every_measured_file_names_its_commands():
    for name in ("position", "inner-loop"):
        commands = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["commands"]
        assert commands
        assert all(command.startswith("moshi-ttt ") for command in commands)
