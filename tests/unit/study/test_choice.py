"""The rule: harmless volumes first, then the largest recall; a choice that was made stays."""

from __future__ import annotations

import json

import pytest

from study.choice import Candidate, choose_arms, choose_volume, read_choices, record
from study.jobs import StudyError
from study.plan import Arm


def candidate(volume: float, recall: float, *worst: float) -> Candidate:
    """With ``recall`` for both groups, and a bucket of each group at ``worst``."""
    return Candidate(volume=volume, recalls=(recall, recall), effects=tuple((0.5, each) for each in (worst or (0.1,))))


def arm(name: str, kind: str | None = "sequence", *, beside_lora: bool = False) -> Arm:
    return Arm(name=name, changes=(), kind=kind, beside_lora=beside_lora)


def test_the_largest_recall_among_harmless_volumes_is_chosen():
    tried = [candidate(0.25, 0.1), candidate(0.5, 0.3, 0.0), candidate(1.0, 0.9, 0.2, -0.001)]
    assert choose_volume(tried).volume == 0.5
    assert not tried[2].harmless


def test_one_bucket_of_one_group_makes_a_volume_harmful():
    tried = [candidate(0.5, 0.3, 0.1, -1e-9), candidate(0.25, 0.2, 0.1, 0.1)]
    assert choose_volume(tried).volume == 0.25


def test_where_none_is_harmless_the_best_worst_bucket_decides():
    tried = [candidate(0.25, 0.1, -0.002), candidate(0.5, 0.3, -0.001), candidate(1.0, 0.9, -0.5)]
    assert choose_volume(tried).volume == 0.5


def test_recall_is_the_mean_over_groups():
    assert Candidate(volume=1, recalls=(0.1, 0.4), effects=((0.0,), (0.0,))).recall == pytest.approx(0.25)


def test_one_arm_of_each_kind_alone_and_beside_lora_is_chosen():
    arms = [
        arm("a"), arm("b"), arm("c", "feed_forward"), arm("d", beside_lora=True), arm("LoRA", None),
    ]  # fmt: skip
    chosen = {"a": candidate(1, 0.2), "b": candidate(1, 0.3), "c": candidate(1, 0.1), "d": candidate(1, 0.4)}
    assert choose_arms(chosen, arms) == {"sequence": "b", "feed_forward": "c", "sequence + LoRA": "d"}


def test_an_arm_without_a_harmless_volume_comes_after_all_others():
    chosen = {"a": candidate(1, 0.1), "b": candidate(1, 0.9, -0.1)}
    assert choose_arms(chosen, [arm("b"), arm("a")]) == {"sequence": "a"}


def test_what_was_chosen_is_recorded_and_stays(tmp_path):
    path = tmp_path / "choices.json"
    record(path, {"a": [candidate(0.5, 0.3), candidate(1.0, 0.9, -0.1)]}, [arm("a")], 0)
    choices = read_choices(path)
    assert choices["volumes"] == {"a": 0.5}
    assert choices["harmless"] == {"a": True}
    assert choices["arms"] == {"sequence": "a"}
    assert choices["candidates"]["a"][1]["volume"] == 1.0
    record(path, {"a": [candidate(1.0, 0.9)]}, [arm("a")], 0)
    assert json.loads(path.read_text()) == choices


def test_without_a_choice_there_is_nothing_to_read(tmp_path):
    with pytest.raises(StudyError, match="no volume was chosen yet, and test recordings are evaluated once"):
        read_choices(tmp_path / "choices.json")
