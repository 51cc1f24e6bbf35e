"""What several seeds say together: means over seeds, intervals over recordings; against what arms are compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from study.curves import held_after, lasting_after, stream_parts
from study.jobs import StudyError
from study.plan import LORA
from study.results import BASE, Measured, StudyResults, candidates, read_json, tensor, write_seed

ARMS = {
    "ridge": {"kind": "sequence", "beside_lora": False},
    LORA: {"kind": None, "beside_lora": False},
    "ridge + LoRA": {"kind": "sequence", "beside_lora": True},
}
CHOICES = {"seed": 0, "arms": {"sequence": "ridge"}, "volumes": {"ridge": 0.5, "ridge + LoRA": 1.0}}


def model(
    losses: list[list[float | None]], buckets: list[list[float | None]], *volumes: float, **more: Any
) -> dict[str, Any]:
    """What was measured of one model, the same at all volumes; and more."""
    settings = [{"condition": "updates on", "volume": volume} for volume in (volumes or (1.0,))]
    return {
        "parameters": 7, "presented": ["a", "b"], "played_once": ["a", "b"],
        "recall": [{**each, "losses": losses} for each in settings],
        "once": [{**each, "buckets": buckets, "last": [row[2] for row in buckets]} for each in settings], **more,
    }  # fmt: skip


def seed(number: int, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Results of two recordings; ``shift`` lowers the second presentation of the memories."""
    base = model([[2.0, 1.9, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]], [[1.0, 1.0, None], [2.0, 2.0, 2.0]])
    lora = model([[2.5, 2.5, 2.0, 2.0], [3.5, 3.5, 3.0, 3.0]], [[1.5, 1.5, None], [2.5, 2.5, 2.5]])
    losses = [[2.0, 1.5 - shift, 2.0, 2.0], [3.0, 2.0 - shift, 3.0, 3.0]]
    memory = model(losses, [[0.9, 0.8, None], [1.7, 1.9, 1.5]], 0.5, 1.0)
    return {
        "seed": number, "scale": {"buckets": [48, 96]}, "arms": ARMS, "choices": CHOICES,
        "groups": {"test": {BASE: base, "ridge": memory, LORA: lora, "ridge + LoRA": memory}}, **changes,
    }  # fmt: skip


def test_gains_are_beyond_the_base_models_recording_by_recording():
    results = StudyResults([seed(0), seed(1, shift=1.0)])
    gain = results.gain("test", "ridge", BASE)
    assert gain.values.tolist() == [pytest.approx([0.4, 1.0]), pytest.approx([1.4, 2.0])]
    assert gain.by_seed == pytest.approx([0.7, 1.7])
    assert gain.interval.value == pytest.approx(1.2)
    assert (gain.interval.low, gain.interval.high) == (pytest.approx(0.9), pytest.approx(1.5))


def test_effects_are_what_is_saved_and_leave_out_recordings_without_the_bucket():
    results = StudyResults([seed(0)])
    assert results.effect("test", "ridge", BASE, 0).interval.value == pytest.approx((0.1 + 0.3) / 2)
    last = results.effect("test", "ridge", BASE, 2)
    assert last.interval.value == pytest.approx(0.5)
    assert math.isnan(last.interval.low), "one recording reaches it: there is no interval"


def test_the_last_bucket_is_of_joined_recordings():
    values = seed(0)
    for arm, losses in ((BASE, [2.0, 3.0, 4.0]), ("ridge", [1.0, 1.0, 1.0])):
        for row in values["groups"]["test"][arm]["once"]:
            row["last"] = losses
    results = StudyResults([values])
    assert results.effect("test", "ridge", BASE, 2).values.tolist() == [[1.0, 2.0, 3.0]]
    assert results.effect("test", "ridge", BASE, 1).values.shape == (1, 2)


def test_an_arm_beside_lora_is_compared_with_the_lora():
    results = StudyResults([seed(0)])
    assert [results.reference(arm) for arm in results.with_memory("test")] == [BASE, LORA]
    effect = results.effect("test", "ridge + LoRA", LORA, 0)
    assert effect.interval.value == pytest.approx((0.6 + 0.8) / 2)


def test_candidates_are_every_arm_at_every_volume_on_validation_recordings():
    values = seed(0)
    values["groups"] = {"valid": values["groups"]["test"], "valid_unseen": values["groups"]["test"]}
    found = candidates(StudyResults([values]))
    assert [each.volume for each in found["ridge"]] == [0.5, 1.0]
    assert found["ridge"][0].recalls == (pytest.approx(0.7), pytest.approx(0.7))
    assert found["ridge"][0].effects[0] == (pytest.approx(0.15), pytest.approx(0.5)), "not the column of all positions"
    assert found["ridge + LoRA"][0].effects[1] == (pytest.approx(0.65), pytest.approx(1.0))


def test_a_setting_that_was_not_measured_raises():
    with pytest.raises(KeyError):
        StudyResults([seed(0)]).gain("test", "ridge", BASE, volume=0.7)


@pytest.mark.parametrize("name", ["choices", "scale", "arms"])
def test_seeds_of_two_studies_are_refused(name):
    with pytest.raises(StudyError, match=rf"seeds 0 and 1 differ in their {name}"):
        StudyResults([seed(0), seed(1, **{name: {}})])


def test_a_seed_is_written_and_read(tmp_path):
    paths = [write_seed(tmp_path / "results", seed(number)) for number in (0, 1)]
    assert [path.name for path in paths] == ["seed_0.json", "seed_1.json"]
    assert StudyResults.read(paths).seeds == [0, 1]
    assert json.loads(paths[0].read_text()) == seed(0)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_file_without_results_raises(tmp_path, text):
    path: Path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StudyError, match=r"results\.json holds no results"):
        read_json(path)


def test_lists_become_numbers():
    assert torch.equal(tensor([[1, 2], [3, 4]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    assert tensor([1, None]).isnan().tolist() == [False, True]
    assert Measured(tensor([[1.0, None], [3.0, None]])).interval.value == 2.0


def test_the_longer_curves():
    values = seed(0)
    lasting = {"volume": 0.5, "clips_between": 4, "seconds_between": 30.0, "gain_by_recording": [0.2, 0.4]}
    more = {"saved_by_recording": [0.1, 0.3], "interludes_saved_by_recording": [0.0, -0.2]}
    group = values["groups"]["test"]
    group["ridge"]["lasting"] = [{**lasting, **more}, {**lasting, **more, "volume": 1.0}]
    group["ridge"]["held"] = [{"volume": 0.5, "counts": [1, 3], "first": [[2, 2], [2, 2]], "again": [[1, 1.5], [1, 1]]}]
    group[BASE]["held"] = [{"volume": 1.0, "counts": [1, 3], "first": [[3, 3], [3, 3]], "again": [[3, 3], [2.8, 3]]}]
    values["groups"]["hour"] = {
        BASE: {"hour": [{"volume": 1.0, "parts": [[1.0, 2.0], [3.0, 4.0]]}]},
        "ridge": {"hour": [{"volume": 0.5, "parts": [[0.5, 2.5], [2.5, 4.0]]}]},
    }
    results = StudyResults([values])
    (after,) = lasting_after(results, "test", "ridge", 0.5)
    assert (after["count"], after["minutes"]) == (4, 0.5)
    assert [after[name].interval.value for name in ("gain", "saved", "once")] == pytest.approx([0.3, 0.2, -0.1])
    one, three = held_after(results, "test", "ridge", 0.5)
    assert (one["held"], three["held"]) == (1, 3)
    assert one["gain"].interval.value == pytest.approx((1.0 + 0.8) / 2)
    assert three["gain"].interval.value == pytest.approx((0.5 + 1.0) / 2)
    (parts,) = stream_parts(results)
    assert parts == {"arm": "ridge", "against": BASE, "volume": 0.5, "saved": [0.5, -0.25], "worst": -0.25}
