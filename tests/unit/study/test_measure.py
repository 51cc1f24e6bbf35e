"""One task: what a model without a memory is spared, and what is written."""

from __future__ import annotations

import json

import pytest

from study.jobs import StudyError
from study.measure import Task, measure
from tests.unit.evaluation.conftest import document, model_with

SETTINGS = (("updates on", 0.5), ("updates on", 1.0), ("updates off", 1.0), ("memory of another", 1.0))


def task(**changes) -> Task:
    options = {
        "config": "train-cpu", "data": "encoded", "name": "model", "adapter": None, "settings": SETTINGS,
        "kinds": ("once", "recall"), "longer": (0.5, 1.0), "frames": 12, "clips": 1, "least": 4, "buckets": (8, 24),
        "held": (1, 2), "hour": (48, 24), "out": "out.json",
    }  # fmt: skip
    return Task(**{**options, **changes})


@pytest.fixture(scope="module")
def recordings():
    return [document(frames, seed) for seed, frames in enumerate((40, 50, 11, 40))]


def test_a_memory_is_measured_under_every_setting(recordings):
    found = measure(task(), model_with("gating_mlp", lr=0.3), recordings)
    for kind, name in (("once", "buckets"), ("recall", "losses")):
        assert [(row["condition"], row["volume"]) for row in found[kind]] == list(SETTINGS)
        figures = {json.dumps((row[name], row.get("last"))) for row in found[kind]}  # memories meet in the last bucket
        assert len(figures) == len(SETTINGS), "each setting changes something"
    assert found["played_once"] == ["talk0", "talk1", "talk3"], "11 frames: the first bucket has three of them"
    assert found["presented"] == ["talk0", "talk1", "talk3"]
    assert found["joined"] == ["talk0 + talk1", "talk2 + talk3"], "44 frames and more"
    assert [len(row["last"]) for row in found["once"]] == [2] * 4
    assert [len(row["buckets"]) for row in found["once"]] == [3] * 4
    assert [len(row["losses"]) for row in found["recall"]] == [3] * 4


def test_the_base_model_is_measured_once(recordings):
    found = measure(task(kinds=("once", "recall", "held", "hour")), model_with(None), recordings)
    assert {(row["condition"], row["volume"]) for row in found["recall"]} == {("updates on", 0.5), ("updates on", 1.0)}
    assert [row["volume"] for row in found["held"]] == [1.0]
    assert [row["volume"] for row in found["hour"]] == [1.0]


def test_too_little_speech_for_the_last_bucket_is_refused(recordings):
    with pytest.raises(StudyError, match="make 1 of 44 frames or more, and two are needed"):
        measure(task(), model_with(None), recordings[:2])


def test_longer_measurements_are_made_at_their_volumes(recordings):
    found = measure(task(kinds=("held", "hour")), model_with("gating_mlp"), recordings)
    assert "once" not in found
    assert [row["volume"] for row in found["held"]] == [0.5, 1.0]
    assert found["held"][0]["counts"] == [1, 2]
    assert [len(row["parts"]) for row in found["hour"]] == [8, 8]


def test_a_task_is_one_argument_of_a_program():
    given = task()
    assert Task(**json.loads(given.text)).text == given.text
