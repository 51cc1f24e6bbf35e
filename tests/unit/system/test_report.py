"""The report writer: JSON without NaN that can be read line by line, tables, intervals, and figures of one style."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moshi_ttt.system.report import figures
from moshi_ttt.system.report.tables import show, show_interval, table
from moshi_ttt.system.report.writer import number, numbers, to_json, write_report
from tests.project import ROOT, packages_on_disk

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


# ---- metrics.json


@given(VALUES)
def test_json_says_what_pythons_own_says(value):
    assert json.loads(to_json(value)) == json.loads(json.dumps(value))


def test_a_key_is_a_line_and_so_is_a_list_of_numbers():
    value = {"made_by": "test", "by_recording": [[1.0, None], [2.5, 3.0]], "none": {}, "seeds": (0, 1)}
    assert to_json(value).splitlines() == [
        "{", '  "made_by": "test",', '  "by_recording": [', "    [1.0, null],", "    [2.5, 3.0]", "  ],",
        '  "none": {},', '  "seeds": [0, 1]', "}",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], {"a": [{"b": -math.inf}]}])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="Out of range float values"):
        to_json(value)


def test_a_key_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match=r"A key of metrics.json is 3. Give a str."):
        to_json({3: 4})


def test_what_is_not_finite_is_null():
    assert [number(value) for value in (1.5, math.nan, math.inf, -math.inf)] == [1.5, None, None, None]
    assert numbers(torch.tensor([1.0, torch.nan])) == numbers([1.0, math.nan]) == [1.0, None]


def test_both_files_end_with_one_new_line(tmp_path):
    write_report(tmp_path, {"made_by": "test"}, ["# Title", "", "text", "", ""])
    assert (tmp_path / "report.md").read_text() == "# Title\n\ntext\n"
    assert (tmp_path / "metrics.json").read_text() == '{\n  "made_by": "test"\n}\n'


# ---- tables


def test_a_table_aligns_numbers_to_the_right_and_keeps_bars_in_cells():
    lines = table(("", "loss", "kind"), [("a|b", "1.0", ""), ("c", "", "x")], "lrl")
    assert lines == ["| | loss | kind |", "| --- | ---: | --- |", "| a\\|b | 1.0 | |", "| c | | x |"]
    assert table(("", "loss"), [])[1] == "| --- | ---: |"


@pytest.mark.parametrize(("row", "align"), [(("a",), None), (("a", "b", "c"), None), (("a", "b"), "l")])
def test_a_row_of_another_length_is_refused(row, align):
    with pytest.raises(ValueError, match=r"A row has \d cells, the header 2"):
        table(("", "loss"), [row], align)


def test_numbers_and_intervals():
    assert show(0.25, 2) == "0.25"
    assert show(0.5, 1, sign=True, scale=100) == "+50.0"
    assert show(math.nan) == show(math.inf) == ""
    assert show_interval(0.5, -0.25, 0.75, 2, sign=True) == "+0.50 (-0.25 to +0.75)"
    assert show_interval(0.5, math.nan, math.nan, 2) == "0.50"
    assert show_interval(math.nan, 0.1, 0.2) == ""


# ---- figures


def simulated(color: str, matrix: list[list[float]]) -> torch.Tensor:
    """The linear RGB ``[3]`` that a reader without one kind of cone sees; Vienot, Brettel and Mollon 1999."""
    encoded = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return torch.tensor(matrix, dtype=torch.float64) @ linear


@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
    ],
    ids=["all cones", "no long-wave cones", "no medium-wave cones"],
)
def test_the_colors_are_told_apart_without_red_or_green_cones(matrix):
    seen = [simulated(color, matrix) for color in figures.PALETTE]
    for i, first in enumerate(seen):
        for second in seen[:i]:
            assert (first - second).norm() > 0.05, (i, first, second)


def test_the_simulation_confuses_what_such_readers_confuse():
    without_long_wave = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    red, green = (simulated(color, without_long_wave) for color in ("#FF0000", "#006400"))
    assert (red - green).norm() < 0.05


def test_many_curves_get_looks_of_their_own():
    looks = [str(figures.colors(place)) for place in range(len(figures.PALETTE) * len(figures.MARKERS))]
    assert len(set(looks)) == len(looks)


def test_a_figure_is_a_png_of_the_one_style_whatever_its_file_is_called(tmp_path):
    figure, (above, below) = figures.panels(2, width=4, height=3, sharex=True)
    figures.interval_bar(above, math.nan, math.nan, 0, figures.BLUE)
    assert not above.lines
    figures.interval_bar(above, 0, 1, 0, figures.BLUE)
    above.plot([0, 1], [0, 1], label="a")
    above.legend()
    figures.name_rows(below, ["first", "second"])
    figures.heading(above, "left")
    figures.save(figure, tmp_path / "temporary")
    assert (tmp_path / "temporary").read_bytes().startswith(b"\x89PNG")
    for axes in (above, below):
        assert not axes.spines["top"].get_visible()
        assert axes.xaxis.label.get_fontsize() == figures.LABEL
    assert [text.get_fontsize() for text in above.get_legend().get_texts()] == [figures.TICK]
    assert above.get_title(loc="left") == "left"
    assert [text.get_text() for text in below.get_yticklabels()] == ["first", "second"]


# ---- there is one of each


def sources() -> dict[str, str]:
    folders = [*packages_on_disk().values(), ROOT / "examples" / "study"]
    paths = [path for folder in folders for path in folder.glob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@pytest.mark.parametrize(
    ("what", "pattern", "places"),
    [
        ("colors", r"#[0-9A-Fa-f]{6}\b", ["figures.py"]),
        ("figures", r"\bFigure\(|\.savefig\(|pyplot", ["figures.py"]),
        ("tables in markdown", r"\| ---", []),
        ("reports", r"report\.md[\"'][^\n]*write_text|METRICS\)\.write_text", ["writer.py"]),
        ("versions of what computed", r'version\(name\) for name in \("moshi-ttt", "moshi"', ["writer.py"]),
        ("bootstraps", r"torch\.quantile\(", ["statistics.py"]),
    ],
)
def test_one_module_makes(what, pattern, places):
    found = [path for path, text in sources().items() if re.search(pattern, text)]
    assert [Path(path).name for path in found] == places, f"{what} are made in {', '.join(found)}"


def test_one_module_makes_null_of_what_is_not_finite():
    found = set()
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.IfExp) and "isfinite" in ast.unparse(node.test) and "None" in ast.unparse(node):
                found.add(path)
    # The log of a run is written line by line during training and is not a report.
    assert found == {"system/report/writer.py", "training/logs.py"}
