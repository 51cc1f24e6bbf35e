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
    study = json.loads((ROOT / "docs" / "study" / "first_edition.json").read_text(encoding="utf-8"))
    (axes,) = drawing.figures(FOLDER)["recall"]().axes
    arms = [label.get_text() for label in axes.get_yticklabels()]
    assert arms == [name for name in study["groups"]["recall, test"]["parameters"] if name != "base"]
    marks = {(line.get_marker(), round(float(line.get_ydata()[0]))): line.get_xdata()[0] for line in axes.lines}
    found = {
        each["subject"]: np.asarray(each["by_recording"]).mean(0)
        for each in study["groups"]["recall, test"]["figures"]
        if each["what"] == "second" and each["condition"] == "updates on"
    }
    for row, arm in enumerate(arms):
        assert marks["o", row] == pytest.approx((found[arm] - found["base"]).mean())


def test_every_measured_file_names_its_commands():
    for name in ("position", "inner-loop"):
        commands = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["commands"]
        assert commands
        assert all(command.startswith("moshi-ttt ") for command in commands)
