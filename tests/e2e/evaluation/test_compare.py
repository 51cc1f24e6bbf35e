"""Several results in one: every figure where it belongs, and nothing that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def interval(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def write(folder: Path, **values) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"base model": "builtin:tiny", "seed": 0, **values}))
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    curve = {"condition": "updates on", "stream": "audio"}
    context = write(
        tmp_path / "context", made_by="moshi-ttt evaluate long-context",
        curves=[
            {**curve, "subject": "base", "loss_beyond_context": interval(2.5, 2.4, 2.6)},
            {**curve, "subject": "ttt", "loss_beyond_context": interval(2.25, 2.2, 2.3)},
        ],
    )  # fmt: skip
    gain = {"subject": "ttt", "condition": "updates on", "hearing": "second", "gain": interval(0.125)}
    recall = write(tmp_path / "recall", made_by="moshi-ttt evaluate recall", gains=[gain])
    pairs = write(
        tmp_path / "pairs", made_by="moshi-ttt evaluate zero-shot", dataset="sblimp",
        variants={"base": {"overall": {"accuracy": interval(0.5, 0.4, 0.6)}}},
    )  # fmt: skip
    return [context, recall, pairs]


def test_every_figure_is_in_the_table(cli, folders, tmp_path):
    result = cli("evaluate", "compare", *folders, "--out", tmp_path / "all")
    assert result.exit_code == 0, result.said
    report = (tmp_path / "all" / "report.md").read_text().splitlines()
    (base,) = [line for line in report if line.startswith("| base |")]
    (ttt,) = [line for line in report if line.startswith("| ttt, updates on |")]
    assert base == "| base | 2.5000 (2.4000 to 2.6000) | | 0.5000 (0.4000 to 0.6000) |"
    assert ttt == "| ttt, updates on | 2.2500 (2.2000 to 2.3000) | 0.1250 | |"
    metrics = json.loads((tmp_path / "all" / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len(metrics["results"]) == 4
    assert metrics["results"][2]["low"] is None
    assert (tmp_path / "all" / "comparison.png").stat().st_size > 5_000


def test_results_of_segments_stand_in_a_column_of_their_own(cli, folders, tmp_path):
    segments = tmp_path / "segments"
    segments.mkdir()
    values = json.loads((folders[0] / "metrics.json").read_text())
    values["curves"][0]["loss_beyond_context"] = interval(3.0, 2.9, 3.1)
    (segments / "metrics.json").write_text(json.dumps({**values, "segment_frames": 192}))
    result = cli("evaluate", "compare", folders[0], segments, "--out", tmp_path / "all")
    assert result.exit_code == 0, result.said
    report = (tmp_path / "all" / "report.md").read_text()
    assert "audio loss beyond the attention context, segments of 192 frames (nats/token)" in report
    assert "| base | 2.5000 (2.4000 to 2.6000) | 3.0000 (2.9000 to 3.1000) |" in report


def test_two_figures_for_the_same_thing_are_refused(cli, folders, tmp_path):
    values = json.loads((folders[0] / "metrics.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    (again / "metrics.json").write_text(json.dumps(values))
    assert cli("evaluate", "compare", folders[0], again, "--out", tmp_path / "same").exit_code == 0
    values["curves"][0]["loss_beyond_context"] = interval(2.75)
    (again / "metrics.json").write_text(json.dumps(values))
    said = cli("evaluate", "compare", folders[0], again, "--out", tmp_path / "all").said
    assert "of base is 2.750000 in" in said
    assert "Compare evaluations of the same recordings" in said
    assert not (tmp_path / "all").exists()


def test_what_cannot_be_compared_is_refused(cli, folders, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not a result of" in cli("evaluate", "compare", empty, "--out", tmp_path / "all").said
    quickstart = write(tmp_path / "quickstart", made_by="moshi-ttt quickstart")
    assert "made by 'moshi-ttt quickstart'" in cli("evaluate", "compare", quickstart, "--out", tmp_path / "all").said
    other = write(tmp_path / "other", **{"made_by": "moshi-ttt evaluate recall", "base model": "a/b", "gains": []})
    result = cli("evaluate", "compare", folders[0], other, "--out", tmp_path / "all")
    assert result.exit_code == 2
    assert "different base models: a/b, builtin:tiny" in result.said
    assert not (tmp_path / "all").exists()
