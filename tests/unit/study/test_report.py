"""The report of results that are made up: every table, every figure, and metrics.json."""

from __future__ import annotations

import json
from typing import Any

import pytest

from study import report as report_of
from study.choice import Candidate
from study.cost import Cost
from study.report import Report
from study.results import BASE, LORA, StudyResults
from tests.unit.study.test_results import ARMS, seed

CONTROLS = ("updates off", "memory reset", "memory of another")


def complete() -> dict[str, Any]:
    """Results of one seed with all that the report shows; an arm that is not judged was validated alone."""
    values = seed(0)
    values["arms"] = {**ARMS, "open": {"kind": "sequence", "beside_lora": False}}
    values["scale"] |= {"context": 16, "base_steps": 2, "steps": 2, "batch": 2, "clip": 96, "hour": [1500, 750]}
    tried = [
        Candidate(volume=volume, recalls=(0.1, 0.2), effects=((0.0, 0.1), (0.2, 0.1))).__dict__ for volume in (0.5, 1.0)
    ]
    values["choices"] = {
        "seed": 0, "arms": {"sequence": "ridge", "sequence + LoRA": "ridge + LoRA"},
        "volumes": {"ridge": 0.5, "ridge + LoRA": 1.0}, "harmless": {"ridge": True, "ridge + LoRA": False},
        "candidates": {"ridge": tried, "ridge + LoRA": tried},
    }  # fmt: skip
    test = values["groups"]["test"]
    for kind, volume in (("recall", 0.5), ("once", 0.5)):
        (row,) = [each for each in test["ridge"][kind] if each["volume"] == volume]
        test["ridge"][kind] += [{**row, "condition": control} for control in CONTROLS]
    held = {"counts": [1, 3], "first": [[2, 2], [2, 2]], "again": [[1, 1.5], [1, 1]]}
    for arm, volume in ((BASE, 1.0), ("ridge", 0.5), ("ridge", 1.0), ("ridge + LoRA", 1.0)):
        test[arm] = {**test[arm], "held": [*test[arm].get("held", []), {"volume": volume, **held}]}
    figures = {f"{name}_by_recording": [0.1, 0.3] for name in ("gain", "saved", "interludes_saved")}
    test["ridge"]["lasting"] = [
        {"volume": 0.5, "clips_between": count, "seconds_between": 7.68 * count, **figures} for count in (1, 8)
    ]
    valid = dict(test)
    valid["open"] = valid["ridge"]
    values["groups"] = {"valid": valid, "valid_unseen": valid, "test": test, "test_unseen": test}
    values["groups"]["hour"] = {
        arm: {"hour": [{"volume": volume, "parts": [[1.0, 2.0], [3.0, 4.0]]}]}
        for arm, volume in ((BASE, 1.0), (LORA, 1.0), ("ridge", 0.5), ("ridge + LoRA", 1.0))
    }
    return values


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return StudyResults([complete()])


@pytest.mark.exhaustive  # the smoke of the study writes one in test-full
def test_a_report_has_every_table_and_figure(results, tmp_path):
    costs = {BASE: Cost(step_ratio=1.0, state_bytes=0), "ridge": Cost(step_ratio=1.5, state_bytes=2048)}
    Report(results=results, speech={"known voices": ["cs"]}, costs=costs, made_by="test").write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    for heading in (
        "# Known voices (2 recordings)", "# Unseen voices (2 recordings)", "## Controls", "## By volume",
        "## After other clips", "## Clips held at once", "# One stream", "# Cost", "## Open questions",
    ):  # fmt: skip
        assert heading in text
    assert "| ridge | 0.5 | 8 | 1.0 | +0.200 (+0.100 to +0.300) |" in text, "after eight clips of 7.7 s"
    assert "| ridge | 7 | 1.50 | 2 |" in text
    for name in ("answer.png", "volumes.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {row["arm"] for row in metrics["figures"] if row["group"] == "test"} == {"ridge", "ridge + LoRA"}
    assert {row["arm"] for row in metrics["figures"] if row["group"] == "valid"} == {"ridge", "ridge + LoRA", "open"}
    assert {(row["arm"], row.get("count"), row.get("held")) for row in metrics["longer"]} >= {
        ("ridge", 8, None), ("ridge", None, 3), ("ridge + LoRA", None, 3),
    }  # fmt: skip
    assert [row["arm"] for row in metrics["one_stream"]] == [LORA, "ridge", "ridge + LoRA"]


def test_without_longer_measurements_their_sections_are_left_out(tmp_path):
    values = complete()
    del values["groups"]["hour"]
    for group in ("test", "test_unseen"):
        values["groups"][group] = {
            arm: {kind: rows for kind, rows in measured.items() if kind not in ("held", "lasting")}
            for arm, measured in values["groups"][group].items()
        }
    Report(results=StudyResults([values]), speech={}, costs={}, made_by="a test").write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## By volume" in text
    for absent in ("held at once", "After other clips", "# One stream", "curves.png"):
        assert absent not in text
    assert not (tmp_path / "curves.png").exists()
    assert json.loads((tmp_path / "metrics.json").read_text())["one_stream"] == []


def test_an_open_question_is_shown_at_the_volume_that_the_rule_would_give(results):
    chosen, whole = report_of.open_table(results)[2:]
    assert chosen.startswith("| open | 0.5 | yes | +0.700 | +0.700 |")
    assert whole.startswith("| open | 1 | yes |"), "what it was trained at is shown as well"


def test_controls_are_at_the_chosen_volume(results):
    ridge, beside = report_of.controls_table(results, "test")[2:]
    assert ridge.startswith("| ridge | 0.5 | +0.700")
    assert ridge.count("(") == 7, "the gain, and three controls of the gain and of speech played once"
    assert beside.count("(") == 1, "its controls were not measured here"


def test_the_answer_has_a_row_for_each_chosen_arm_at_its_volume(results):
    header, _, ridge, beside = report_of.answer(results)
    assert header.count("recall, ") == header.count("worst bucket, ") == 2, "both groups"
    cells = [cell.strip() for cell in ridge.split("|")[1:-1]]
    assert cells[:4] == ["ridge (sequence)", "base", "0.5", "+0.700 (+0.400 to +1.000)"]
    effects = [results.effect("test", "ridge", "base", column, volume=0.5).interval for column in (1, 2)]
    assert cells[5] == min(effects, key=lambda each: each.value).show(4, sign=True)
    assert cells[-1] == "+0.0000", "both streams are the same here"
    assert beside.startswith("| ridge + LoRA (sequence + LoRA) | LoRA | 1 |")
    assert beside.count("(") == 1 + 2 * 2, "its controls were not measured here"


def test_buckets_have_names(results):
    assert report_of.buckets(results) == ["48 to 95", "48 to 95", "96 and more"]
