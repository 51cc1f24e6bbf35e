"""Recall against its cost by volume: 0 is the base model, 1 is what is reported without one, and lists are checked."""

from __future__ import annotations

import json

import pytest
import torch

from moshi_ttt.core.errors import ConfigError, ContextError
from moshi_ttt.evaluation.models import evaluate_codes
from moshi_ttt.evaluation.recall import evaluate
from moshi_ttt.evaluation.reporting import write_recall
from moshi_ttt.evaluation.volumes import read_volumes
from tests.unit.evaluation.conftest import CONTEXT, document, model_with

FRAMES = 2 * CONTEXT
VOLUMES = (0.0, 0.5, 1.0)


SHORT = {"frames": 2 * CONTEXT, "conditions": ("updates on",), "clips": 1, "talks": 2}
"""For what does not depend on how much is evaluated."""


def run(models, volumes=VOLUMES, *, talks=3, **changes):
    chosen = {"frames": FRAMES, "conditions": ("updates on", "updates off"), "batch_size": 6, "clips": 2, **changes}
    documents = [document(2 * FRAMES, n) for n in range(talks)]
    return evaluate(models, documents, volumes=volumes, **chosen)


@pytest.fixture
def loud():
    return model_with("ttt_mlp", base_lr=1.0, gate={"init": 1.0})


def test_the_ends_of_the_curve_are_the_base_model_and_the_adapter(base, loud):
    result = run([base, loud])
    silent, half, full = result.by_volume
    assert [each.volume for each in result.by_volume] == list(VOLUMES)
    assert silent.apart == 0
    for name in ("recall", "cost", "saved"):
        assert not getattr(silent, name).any()
        assert getattr(silent, name).shape == (3,)
    second, own = result.of("base", "updates on", "second"), result.of("ttt_mlp", "updates on", "second")
    assert torch.allclose(full.recall, own.values - second.values, atol=1e-12)
    assert torch.allclose(full.saved, second.losses - own.losses, atol=1e-12)
    first = [each.values + each.losses for each in (own, second)]  # what it saves against the first, and itself
    assert torch.allclose(full.cost, first[0] - first[1], atol=1e-12)
    assert full.interval("recall", 0) == result.beyond_base(own)
    assert full.interval("saved", 0) == result.saved(own)
    assert not torch.allclose(half.cost, full.cost)
    assert half.apart > 0


@pytest.mark.exhaustive  # a second way to the same figures
def test_a_point_is_what_is_measured_at_that_volume(base, loud):
    (point,) = run([base, loud], (0.25,), clips=1).by_volume
    clips = [document(2 * FRAMES, n).codes[:, :FRAMES] for n in range(3)]
    losses_of = torch.stack([torch.cat([a, a, clips[(n + 1) % 3], a], dim=1) for n, a in enumerate(clips)])
    theirs, own = (
        evaluate_codes(tested, losses_of, "updates on", every=FRAMES, volume=volume).audio.unflatten(1, (4, FRAMES))[
            :, :, CONTEXT:
        ]
        for tested, volume in ((base, 1.0), (loud, 0.25))
    )
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(point.cost, (own[:, 0] - theirs[:, 0]).nanmean(1), **close)
    torch.testing.assert_close(point.saved, (theirs[:, 1] - own[:, 1]).nanmean(1), **close)
    gains = [(each[:, 0] - each[:, 1]).nanmean(1) for each in (own, theirs)]
    torch.testing.assert_close(point.recall, gains[0] - gains[1], **close)


@pytest.mark.exhaustive  # counts work; figures are compared above
def test_the_base_model_and_volume_1_are_evaluated_once(base, loud):
    losses_of = []
    run([base, loud], batch_size=2, on_batch=lambda: losses_of.append(None))
    assert len(losses_of) == 3 * (1 + 2 + 2)  # three batches: the base; updates on and off; volumes 0 and 0.5


def test_without_volumes_nothing_else_is_evaluated(base, loud, tmp_path):
    result = run([base, loud], ())
    assert result.by_volume == []
    write_recall(tmp_path, result, made_by="test")
    assert "by_volume" not in json.loads((tmp_path / "metrics.json").read_text())
    assert not (tmp_path / "recall_by_volume.png").exists()


def test_a_report_has_the_curve(base, loud, tmp_path):
    quiet = model_with("gating_mlp", name="in place", lr=0.3)
    result = run([base, loud, quiet])
    write_recall(tmp_path, result, made_by="test")
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    points = metrics["by_volume"]
    assert [(each["subject"], each["volume"]) for each in points] == [
        (name, volume) for name in ("ttt_mlp", "in place") for volume in VOLUMES
    ]
    assert points[0]["largest_difference_from_base"] == 0
    assert points[0]["cost"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    for point in points:
        for name in ("recall", "cost", "saved"):
            assert point[name]["low"] <= point[name]["value"] <= point[name]["high"]
            assert len(point[f"{name}_by_recording"]) == 3
    report = (tmp_path / "report.md").read_text()
    assert "| in place | 0.5 | " in report
    assert "At volume 0, the losses of ttt_mlp are the base model's, bit for bit." in report
    assert "![recall against cost](recall_by_volume.png)" in report
    assert (tmp_path / "recall_by_volume.png").stat().st_size > 10_000


@pytest.mark.exhaustive  # one sentence of a report, for four models
def test_a_report_says_what_the_volume_multiplies(base, loud, tmp_path):
    quiet = model_with("ttt_mlp", name="quiet", output_scale=0.25)
    first, _ = run([base, quiet, loud], (0.5,), **SHORT).by_volume
    assert first.output_scales == (0.25,)
    two = model_with("ttt_mlp", name="two", layers="0,1", output_scale=0.5)
    block = next(iter(two.injection.blocks.values()))
    block.config = block.config.model_copy(update={"output_scale": 2.0})
    result = run([base, quiet, loud, two], (0.5,), **SHORT)
    write_recall(tmp_path, result, made_by="test")
    points = json.loads((tmp_path / "metrics.json").read_text())["by_volume"]
    assert [each["output_scales"] for each in points] == [[0.25], [1.0], [0.5, 2.0]]
    report = (tmp_path / "report.md").read_text()
    assert "multiplies the adapter's own `output_scale`: quiet 0.25; ttt_mlp 1; two 0.5 to 2." in report


@pytest.mark.exhaustive  # a second way to the same figures
def test_what_is_not_at_the_volume_shows(base, loud, tmp_path):
    # As with an adapter's LoRA: the model differs from the base outside its blocks.
    with torch.no_grad():
        loud.model.text_emb.weight.mul_(1.5)
    result = run([base, loud], (0.0,), **SHORT)
    assert result.by_volume[0].apart > 0
    write_recall(tmp_path, result, made_by="test")
    assert (
        "At volume 0, the losses of ttt_mlp differ from the base model's by at most"
        in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("texts", "volumes"),
    [(["0,0.25,0.5,1"], (0, 0.25, 0.5, 1)), (["1,0"], (0, 1)), ([" 0.5 , 2"], (0.5, 2)), (["0", "1"], (0, 1)),
     (["1e-1"], (0.1,)), (["-0"], (0,))],
)  # fmt: skip
def test_lists_are_read(texts, volumes):
    assert read_volumes(texts) == volumes


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "'' is no volume"), (",", "'' is no volume"), ("0,,1", "'' is no volume"), ("0,1,", "'' is no volume"),
     ("0,half", "'half' is no volume"), ("0,-0.5", "'-0.5' is no volume"), ("nan", "'nan' is no volume"),
     ("0,inf", "'inf' is no volume"), ("0,11", "from 0 .the base model. to 10"), ("0;1", "'0;1' is no volume"),
     ("0.5,1,0.50", "'0.5' and '0.50' are one volume"), ("0,-0", "'0' and '-0' are one"),
     ("1_0", "'1_0' is no volume")],
)  # fmt: skip
def test_odd_lists_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        read_volumes([text])


def test_a_volume_of_nobody_is_refused(base):
    with pytest.raises(ConfigError, match="no volume without blocks"):
        run([base])


def test_volumes_without_the_base_model_or_updates_on_are_refused(base, loud):
    losses_of = []
    for models, conditions in (
        ([base, loud], ("updates off",)), ([loud], ("updates on",)), ([loud, base], ("updates on",)),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"against the base model.*first model.*'updates on'"):
            run(models, (0.5,), conditions=conditions, on_batch=lambda: losses_of.append(None))
    assert losses_of == []
    assert run([base, loud], (), conditions=("updates off",)).by_volume == []


def test_blocks_that_do_not_follow_are_refused_before_any_evaluation(base, loud, monkeypatch):
    losses_of = []
    (block,) = loud.injection.blocks.values()
    monkeypatch.setattr(type(block), "scales_output", False)
    with pytest.raises(ContextError, match="does not declare scales_output"):
        run([base, loud], batch_size=2, on_batch=lambda: losses_of.append(None))
    assert losses_of == []
    assert run([base, loud], (1.0,), **SHORT).by_volume[0].volume == 1
