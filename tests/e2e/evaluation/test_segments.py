"""Hearing in segments: the training form, under the same conditions, at the same positions, and said to be so."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.long_context import Options, evaluate
from moshi_ttt.evaluation.models import CONDITIONS, evaluate_codes
from moshi_ttt.evaluation.reporting import write_long_context
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS
from tests.unit.evaluation.conftest import CONTEXT, document, model_with

pytestmark = pytest.mark.each_kind

VARIANTS = ("ttt_linear", "ttt_mlp", "gating_mlp")


def options(**changes) -> Options:
    return Options(
        **{"window": 4, "every": 12, "batch_size": 2, "conditions": CONDITIONS, "segments": 12, **changes}
    )  # fmt: skip


def codes_of(frames: int, *seeds: int) -> torch.Tensor:
    return torch.stack([document(frames, seed).codes for seed in seeds])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_one_segment_that_attention_sees_is_a_stream(variant):
    tested = model_with(variant, context=48)
    codes = codes_of(24, 0, 1)
    for condition in tested.conditions[:2]:
        in_one_segment = evaluate_codes(tested, codes, condition, every=24, segments=24)
        streamed = evaluate_codes(tested, codes, condition, every=24)
        for actual, expected in zip(in_one_segment, streamed, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_off_in_one_segment_is_one_forward_without_learning(variant):
    tested = model_with(variant)
    codes = codes_of(20, 0)
    losses_of = evaluate_codes(tested, codes, "updates off", every=20, segments=20).audio
    with torch.no_grad(), MOSHI_HOST.updates(tested.model, False), MOSHI_HOST.carry(tested.model):
        out = tested.model(codes)
    wanted = torch.where(out.mask, codes[:, 1 : 1 + FEW_CODEBOOKS["dep_q"]], 0)
    losses = F.cross_entropy(out.logits.movedim(-1, 1), wanted, reduction="none").masked_fill(~out.mask, torch.nan)
    close(losses_of, losses.double().nanmean(1))
    on = evaluate_codes(tested, codes, "updates on", every=20, segments=20).audio
    assert not torch.equal(losses_of.nan_to_num(), on.nan_to_num())


@pytest.mark.parametrize("variant", VARIANTS)
def test_conditions_act_between_segments(variant):
    tested = model_with(variant)
    codes = codes_of(24, 0, 1)
    first, second = codes.split(12, dim=2)
    losses_of = {each: evaluate_codes(tested, codes, each, every=12, segments=6).audio for each in CONDITIONS}
    for condition in ("memory reset", "memory of another"):
        assert torch.equal(losses_of[condition][:, :11], losses_of["updates on"][:, :11])
        assert not torch.equal(losses_of[condition][:, 12:].nan_to_num(), losses_of["updates on"][:, 12:].nan_to_num())
    # A memory that was reset knows nothing of before; another's is that of a row that was given the other first.
    close(losses_of["memory reset"][:, 12:], evaluate_codes(tested, second, "updates on", every=12, segments=6).audio)
    other = torch.cat([first.roll(1, 0), second], dim=2)
    close(
        losses_of["memory of another"][:, 12:],
        evaluate_codes(tested, other, "updates on", every=12, segments=6).audio[:, 12:],
    )


def test_attention_restarts_and_memory_does_not():
    codes = codes_of(24, 0, 1)
    changed = torch.cat([codes_of(12, 5, 6), codes[:, :, 12:]], dim=2)
    for variant, same in ((None, True), ("ttt_mlp", False)):
        tested = model_with(variant, context=48)
        one, other = (
            evaluate_codes(tested, each, "updates on", every=12, segments=12).audio[:, 12:] for each in (codes, changed)
        )
        assert torch.equal(one.nan_to_num(), other.nan_to_num()) is same


def test_an_evaluation_in_segments_changes_no_later_result():
    tested = model_with("ttt_mlp")
    codes = codes_of(16, 0, 1)
    before = {name: tensor.clone() for name, tensor in tested.model.state_dict().items()}
    random = torch.get_rng_state()
    streamed = evaluate_codes(tested, codes, "updates on", every=4).audio
    losses_of = {each: evaluate_codes(tested, codes, each, every=8, segments=4).audio for each in CONDITIONS}
    for condition in CONDITIONS:
        again = evaluate_codes(tested, codes, condition, every=8, segments=4).audio
        assert torch.equal(again.nan_to_num(), losses_of[condition].nan_to_num())
    assert torch.equal(evaluate_codes(tested, codes, "updates on", every=4).audio.nan_to_num(), streamed.nan_to_num())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tested.model.state_dict().items())
    assert {block.inner_lr_factor for block in tested.injection.blocks.values()} == {1.0}


def test_positions_are_counted_from_the_beginning_whatever_the_segments(base):
    documents = [document(30, 0), document(20, 1)]
    result = evaluate([base], documents, options(segments=12))
    windows = result.curve("base", "updates on", "audio").windows
    assert windows.shape == (2, 8)  # the last is half full
    alone = evaluate_codes(base, documents[0].codes[None, :, 24:], "updates on", every=12, segments=12).audio[0]
    close(windows[0, 6], alone[:4].mean())
    assert (result.context, result.reach) == (CONTEXT, CONTEXT)


@pytest.mark.parametrize(("segments", "reach", "first"), [(4, 4, 1), (6, 6, 2), (12, CONTEXT, 2)])
def test_attention_reaches_no_further_than_a_segment(base, segments, reach, first):
    result = evaluate([base], [document(24, 0)], options(segments=segments))
    assert result.reach == reach
    assert result.curve("base", "updates on", "audio").first_beyond == first


@pytest.mark.exhaustive  # one sentence of a report
def test_the_report_says_that_attention_restarts(base, tmp_path):
    for name, segments in (("segments", 12), ("stream", None)):
        folder = tmp_path / name
        folder.mkdir()
        result = evaluate(
            [base, model_with("ttt_mlp")], [document(24, n) for n in range(2)], options(segments=segments)
        )
        write_long_context(folder, result, made_by="test", frame_seconds=0.08)
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["segment_frames"], metrics["attention_restarts"]) == (segments, segments is not None)
        assert metrics["figures_from_frame"] == 8
        report = (folder / "report.md").read_text()
        assert ("it restarts at each segment" in report) is (segments is not None)
        assert ("token by token" in report) is (segments is None)
        assert "ttt_mlp, memory of another" in report


def test_an_intervention_inside_a_segment_is_refused(base):
    tested = model_with("ttt_mlp")
    documents = [document(24, n) for n in range(2)]
    message = "Memory reset and memory of another every 10 frames would act inside a segment of 4"
    with pytest.raises(ConfigError, match=rf"{message}.*such as 8 or 12, or leave it out"):
        evaluate([base, tested], documents, options(every=10, segments=4))
    with pytest.raises(ConfigError, match=r"Memory reset every 3 frames .* such as 4, or leave it out"):
        evaluate_codes(tested, codes_of(8, 0), "memory reset", every=3, segments=4)
    # Where nothing acts there is nothing to refuse.
    evaluate([base], documents, options(every=10, segments=4))
    evaluate([tested], documents, options(every=10, segments=4, conditions=CONDITIONS[:2]))


@pytest.mark.parametrize("segments", [0, -4])
def test_segments_of_nothing_are_refused(base, segments):
    with pytest.raises(ConfigError, match=rf"Segments of {segments} frames: give 1 or more, or none to stream"):
        evaluate([base], [document(24, 0)], options(segments=segments))


def test_recordings_of_one_segment_are_refused_with_what_is_needed(base):
    with pytest.raises(ConfigError, match=r"8 frames are needed \(context 8, segments of 4, one window of 4\)"):
        evaluate([base], [document(7, 0)], options(segments=4))


def test_one_row_has_no_others_memory():
    with pytest.raises(ConfigError, match="two recordings or more"):
        evaluate_codes(model_with("ttt_mlp"), codes_of(8, 0), "memory of another", every=4, segments=4)
