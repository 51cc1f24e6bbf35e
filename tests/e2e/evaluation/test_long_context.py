"""Loss by position: conditions do what they say, positions and missing ones are right, nothing is left behind."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.figure import Figure

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.documents import batches
from moshi_ttt.evaluation.long_context import Options, evaluate, read_spans
from moshi_ttt.evaluation.models import CONDITIONS, evaluate_codes
from moshi_ttt.evaluation.reporting import look, write_long_context
from moshi_ttt.evaluation.teacher_forcing import stream_losses
from tests.unit.evaluation.conftest import CONTEXT, document, model_with

pytestmark = pytest.mark.each_kind

VARIANTS = ("ttt_linear", "ttt_mlp", "gating_mlp")


def options(**changes) -> Options:
    return Options(**{"window": 4, "every": 8, "batch_size": 2, "conditions": CONDITIONS, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_conditions_change_what_they_say_and_nothing_before_they_act(variant):
    tested = model_with(variant)
    codes = torch.stack([document(24, 0).codes, document(24, 1).codes])
    losses_of = {condition: evaluate_codes(tested, codes, condition, every=12).audio for condition in CONDITIONS}
    on = losses_of["updates on"]
    assert torch.equal(on.nan_to_num(), stream_losses(tested.model, codes).audio.nan_to_num())
    # A chunk's own tokens are learned from at once, but in place only when the chunk has ended.
    learns = 5 if variant == "gating_mlp" else 1
    for condition, first in (("updates off", learns), ("memory reset", 12), ("memory of another", 12)):
        other = losses_of[condition]
        same = max(0, first - 2)  # a frame's late codebooks are predicted in the next
        assert torch.equal(other[:, :same], on[:, :same]), condition
        assert not torch.equal(other[:, first:].nan_to_num(), on[:, first:].nan_to_num()), condition


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_off_is_a_memory_that_never_learns(variant):
    # Reset before every chunk: what is learned never comes to anything.
    tested = model_with(variant)
    codes = document(16, 0).codes[None]
    off = evaluate_codes(tested, codes, "updates off", every=1).audio
    # The control: with a learning rate of almost nothing the same numbers.
    tested.injection.set_inner_lr_factor(1e-12)
    slow = stream_losses(tested.model, codes).audio
    tested.injection.set_inner_lr_factor(1.0)
    torch.testing.assert_close(off, slow, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_memory_of_another_is_the_memory_of_another():
    tested = model_with("ttt_mlp")
    same = torch.stack([document(24, 0).codes] * 2)
    alike = evaluate_codes(tested, same, "memory of another", every=8).audio
    torch.testing.assert_close(alike, evaluate_codes(tested, same, "updates on", every=8).audio, equal_nan=True)
    with pytest.raises(ConfigError, match="two recordings or more"):
        evaluate_codes(tested, same[:1], "memory of another", every=8)


def test_an_evaluation_leaves_everything_as_it_was():
    tested = model_with("ttt_mlp")
    codes = torch.stack([document(16, 0).codes, document(16, 1).codes])
    before = {name: tensor.clone() for name, tensor in tested.model.state_dict().items()}
    random = torch.get_rng_state()
    first = evaluate_codes(tested, codes, "updates on", every=4).audio
    for condition in CONDITIONS:
        evaluate_codes(tested, codes, condition, every=4)
    assert torch.equal(evaluate_codes(tested, codes, "updates on", every=4).audio.nan_to_num(), first.nan_to_num())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tested.model.state_dict().items())
    assert {block.inner_lr_factor for block in tested.injection.blocks.values()} == {1.0}


def test_windows_are_at_their_positions_and_missing_ones_are_missing(base):
    documents = [document(12, 0), document(27, 1), document(20, 2), document(9, 3)]
    result = evaluate([base], documents, options())
    assert result.left_out == ["talk3 (9 frames)"]
    assert result.recordings == ["talk1", "talk2", "talk0"]
    audio = result.curve("base", "updates on", "audio")
    assert audio.windows.shape == (3, 7)
    assert audio.first_beyond == CONTEXT // 4
    assert audio.windows[:, 6].isnan().tolist() == [False, True, True]
    assert audio.windows[:, 4].isnan().tolist() == [False, False, True]
    alone = stream_losses(base.model, documents[1].codes[None]).audio[0]
    torch.testing.assert_close(audio.windows[0, 3], alone[12:16].nanmean(), rtol=1e-4, atol=1e-5)


def test_batches_leave_no_one_alone():
    documents = [document(10 + n, n) for n in range(5)]
    sizes = [len(chosen) for chosen, _ in batches(documents, 2, -1)]
    assert sizes == [3, 2]
    assert sorted(d.name for chosen, _ in batches(documents, 2, -1) for d in chosen) == [d.name for d in documents]


def test_the_base_saves_nothing_against_itself_and_a_copy_neither(base):
    tested = model_with("ttt_mlp", name="mute", noise=0.0, gate={"init": 0.0})
    result = evaluate([base, tested], [document(24, n) for n in range(3)], options())
    for condition in CONDITIONS:
        curve = result.curve("mute", condition, "audio")
        saved = result.saved(curve, result.curve("base", "updates on", "audio"))
        assert saved.value == pytest.approx(0.0, abs=1e-6)


def test_too_short_recordings_are_refused_with_what_is_needed(base):
    with pytest.raises(ConfigError, match=r"12 frames are needed \(context 8, one window of 4\), the longest has 11"):
        evaluate([base], [document(11, 0)], options())


def test_a_report_has_every_number_and_no_nan(base, tmp_path):
    tested = model_with("ttt_mlp")
    result = evaluate([base, tested], [document(24, 0), document(16, 1, text=False)], options())
    result.facts["data"] = "made up"
    write_long_context(tmp_path, result, made_by="test", frame_seconds=0.08)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (metrics["made_by"], metrics["data"], metrics["context_frames"]) == ("test", "made up", CONTEXT)
    assert len(metrics["curves"]) == 2 * (1 + len(CONDITIONS))
    assert metrics["curves"][0]["by_recording"][1][5] is None
    report = (tmp_path / "report.md").read_text()
    for part in ("ttt_mlp, memory of another", "saved against base", "Intervals: 95 %", "made up"):
        assert part in report
    assert (tmp_path / "audio_by_position.png").stat().st_size > 5_000


def test_what_is_saved_by_span_is_the_mean_over_the_recordings_that_reach_it(base, tmp_path):
    tested = model_with("ttt_mlp")
    documents = [document(frames, n) for n, frames in enumerate((12, 28, 20, 40))]
    result = evaluate([base, tested], documents, options(spans=(0, 12, 20, 100)))
    curve, other = (result.curve(name, "updates on", "audio") for name in ("ttt_mlp", "base"))
    spans = result.saved_by_span(curve, other)
    # From the second window on: attention sees eight frames. No recording has 100.
    assert [(span.label, span.recordings) for span in spans] == [("0 to 11", 4), ("12 to 19", 3), ("20 to 99", 2)]
    difference = other.windows - curve.windows
    for span, columns in zip(spans, (slice(2, 3), slice(3, 5), slice(5, None)), strict=True):
        expected = difference[:, columns].nanmean(1).nanmean()
        assert span.saved.value == pytest.approx(float(expected), rel=1e-6)
    write_long_context(tmp_path, result, made_by="test", frame_seconds=0.08)
    assert "| | 0 to 11 (4) | 12 to 19 (3) | 20 to 99 (2) |" in (tmp_path / "report.md").read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [span["to_frame"] for span in metrics["curves"][-1]["saved_by_span"]] == [12, 20, 100]


@pytest.mark.parametrize("text", ["", "20,20", "30,20", "a", "20,", "-4"])
def test_spans_are_ascending_numbers_of_frames(text):
    with pytest.raises(ConfigError, match="ascending numbers of frames, such as 48,192,480,960"):
        read_spans(text, 4)


def test_spans_begin_where_windows_do():
    assert read_spans("0,48,192", 48) == (0, 48, 192)
    with pytest.raises(ConfigError, match="100 is inside a window of 48 frames"):
        read_spans("48,100", 48)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are written, by which nothing is written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    return figures


def test_the_plot_shows_losses_above_and_what_is_saved_below(base, drawn, tmp_path):
    tested = model_with("ttt_linear")
    result = evaluate([base, tested], [document(24, n, text=False) for n in range(2)], options())
    write_long_context(tmp_path, result, made_by="test", frame_seconds=0.08)
    (figure,) = drawn
    above, below = figure.axes
    assert above.get_shared_x_axes().joined(above, below)
    on = result.curve("ttt_linear", "updates on", "audio").windows
    saved = (result.curve("base", "updates on", "audio").windows - on).nanmean(0)
    lines = {tuple(round(float(y), 6) for y in line.get_ydata()) for line in below.lines}
    assert tuple(round(float(y), 6) for y in saved) in lines
    assert (0.0, 0.0) in lines
    # The legend is beside the panels and over nothing.
    (legend,) = figure.legends
    figure.draw_without_rendering()
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["base", "ttt_linear", "", *CONDITIONS]


def test_the_base_alone_has_nothing_to_save(base, drawn, tmp_path):
    result = evaluate([base], [document(24, 0, text=False)], options())
    write_long_context(tmp_path, result, made_by="test", frame_seconds=0.08)
    assert [len(figure.axes) for figure in drawn] == [1]


def test_no_two_curves_look_alike():
    models = ["base", *(f"model {number}" for number in range(19))]
    looks = [str(look(models, tested, condition)) for tested in models for condition in CONDITIONS]
    assert len(set(looks)) == len(looks)
