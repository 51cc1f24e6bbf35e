"""What several seeds say together: means over seeds, intervals over recordings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from study.jobs import StudyError
from study.results import Measured, read_group


def evaluation(folder: Path, **values: Any) -> Path:
    folder.mkdir()
    models = {"base": {"parameters": 0}, "ttt": {"parameters": 7}}
    known = {"recordings": ["a", "b"], "subjects": models, **values}
    (folder / "metrics.json").write_text(json.dumps(known))
    return folder


def gain(arm: str, values: list[float | None], condition: str = "updates on") -> dict[str, Any]:
    return {
        "subject": arm, "condition": condition, "hearing": "second", "by_recording": values,
        "loss_by_recording": [None if value is None else 10 - value for value in values],
    }  # fmt: skip


def test_gains_of_seeds_are_averaged_recording_by_recording(tmp_path):
    folders = [
        evaluation(tmp_path / "0", gains=[gain("base", [0.0, 0.0]), gain("ttt", [1.0, 3.0])]),
        evaluation(tmp_path / "1", gains=[gain("base", [0.0, 1.0]), gain("ttt", [3.0, 5.0])]),
    ]
    group = read_group(folders)
    assert group.parameters == {"base": 0, "ttt": 7}
    assert group.arms() == ["base", "ttt"]
    saved = group.of("second", "ttt").minus(group.of("second", "base"))
    assert saved.by_seed == [2.0, 3.5]
    assert saved.interval.value == 2.75
    assert (saved.interval.low, saved.interval.high) == (2.0, 3.5)  # the two recordings alone, by chance equal
    assert group.of("loss, second", "ttt").by_seed == [8.0, 6.0]
    assert group.of("loss, first", "ttt").by_seed == [10.0, 10.0]


def test_windows_within_the_attention_do_not_count(tmp_path):
    curve = {
        "subject": "base", "condition": "updates on", "stream": "audio", "by_recording": [[9, 1, 3], [9, 5, None]],
    }  # fmt: skip
    group = read_group([evaluation(tmp_path / "0", curves=[curve], figures_from_frame=50, window_frames=50)])
    own = group.of("audio", "base")
    assert own.values.shape == (1, 2, 2)
    assert own.by_seed == [3.5]
    assert group.windows["audio", "base", "updates on"].shape == (1, 2, 3)


def test_one_recording_has_no_interval():
    interval = Measured(torch.ones(3, 1, 1)).interval
    assert interval.value == 1.0
    assert math.isnan(interval.low)


def test_other_recordings_raise(tmp_path):
    first = evaluation(tmp_path / "0", gains=[gain("base", [0.0, 0.0])])
    second = evaluation(tmp_path / "1", gains=[gain("base", [0.0])], recordings=["a"])
    with pytest.raises(StudyError, match=r"1 is about other recordings than .*0: delete both"):
        read_group([first, second])


def test_a_folder_without_an_evaluation_raises(tmp_path):
    with pytest.raises(StudyError, match=r"gone holds no evaluation .*Delete it"):
        read_group([tmp_path / "gone"])
