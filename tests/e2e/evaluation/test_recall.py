"""Recall: nothing is worth nothing, a memory that must help helps, and what attention does is kept out."""

from __future__ import annotations

import json

import pytest
import torch

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.clips import lay_out, processed_own
from moshi_ttt.evaluation.models import CONDITIONS, evaluate_codes
from moshi_ttt.evaluation.recall import evaluate
from moshi_ttt.evaluation.reporting import write_recall
from moshi_ttt.evaluation.teacher_forcing import stream_losses
from tests.unit.evaluation.conftest import CONTEXT, REACH, document, model_with

FRAMES = 3 * CONTEXT
"""More than ``REACH``."""


def run(models, documents=None, **changes):
    documents = documents or [document(FRAMES + n, n) for n in range(3)]
    chosen = {"frames": FRAMES, "conditions": CONDITIONS, "batch_size": 2, **changes}
    return evaluate(models, documents, **chosen)


def test_without_memory_there_is_nothing_to_recall(base):
    # What is beyond the reach of attention must be the same both times.
    result = run([base], frames=FRAMES)
    gain = result.gain(result.of("base", "updates on", "second"))
    assert abs(gain.value) < 0.02


@pytest.mark.exhaustive  # a second way to the same figures
def test_what_is_counted_is_what_was_presented_again(base):
    tested = model_with("ttt_mlp", base_lr=1.0, gate={"init": 1.0})
    result = run([base, tested])
    on = result.of("ttt_mlp", "updates on", "second").values
    off = result.of("ttt_mlp", "updates off", "second").values
    assert on.shape == (3,)
    assert (on - off).abs().max() > 1e-3  # what it learned changes what it predicts
    reset = result.of("ttt_mlp", "memory reset", "second").values
    assert (on - reset).abs().max() > 1e-3  # so does what it still knows when the second presentation begins


def test_gains_are_differences_by_recording(base):
    documents = [document(FRAMES, n) for n in range(2)]
    result = run([base], documents)
    for row, other in ((0, 1), (1, 0)):
        clip, between = documents[row].codes, documents[other].codes
        losses = stream_losses(base.model, torch.cat([clip, clip, between, clip], 1)[None]).audio[0]
        first, second, _, third = losses.unflatten(0, (4, FRAMES))[:, CONTEXT:]
        for presentation, values in (("second", second), ("third", third)):
            actual = result.of("base", "updates on", presentation).values[row]
            torch.testing.assert_close(actual, (first - values).nanmean(), rtol=1e-3, atol=1e-5)
            own = result.of("base", "updates on", presentation).losses[row]
            torch.testing.assert_close(own, values.nanmean(), rtol=1e-3, atol=1e-5)


@pytest.mark.exhaustive  # a second way to the same figures
def test_a_gain_that_comes_of_a_worse_first_presentation_shows(base):
    """What a presentation itself saves is against the base model's own loss in it, whatever the first one was."""
    result = run([base, model_with("ttt_mlp", base_lr=1.0, gate={"init": 1.0})])
    for presentation in ("second", "third"):
        base_loss = result.of("base", "updates on", presentation).losses
        own = result.of("ttt_mlp", "updates on", presentation)
        assert result.saved(own).value == pytest.approx(float((base_loss - own.losses).mean()))
        assert result.saved(result.of("base", "updates on", presentation)).value == 0


def losses_by_definition(model, documents, rows, frames=FRAMES):
    """``[P, 4, T]``: each row a stream alone, of (recording, clip) as A and as B."""

    def codes(recording, number):
        return documents[recording].codes[:, number * frames : (number + 1) * frames]

    presented = [torch.cat([codes(*own), codes(*own), codes(*between), codes(*own)], 1) for own, between in rows]
    return torch.stack([stream_losses(model, each[None]).audio[0].unflatten(0, (4, frames)) for each in presented])


@pytest.mark.exhaustive  # a second way to the same figures
def test_one_clip_of_each_gives_the_numbers_it_gave():
    # How it was before there were clips: rows in the order of the recordings, B the next one.
    tested = model_with("ttt_mlp")
    frames = 2 * CONTEXT
    documents = [document(frames + n, n) for n in range(5)]
    clips = torch.stack([document.codes[:, :frames] for document in documents])
    presented = torch.cat([clips, clips, clips.roll(-1, 0), clips], dim=2)
    result = run([tested], documents, frames=frames)
    for condition in CONDITIONS:
        rows = [evaluate_codes(tested, part, condition, every=frames).audio for part in presented.tensor_split(2)]
        first, second, _, third = torch.cat(rows).unflatten(1, (4, frames))[:, :, CONTEXT:].unbind(1)
        for presentation, later in (("second", second), ("third", third)):
            assert torch.equal(result.of("ttt_mlp", condition, presentation).values, (first - later).nanmean(1))


def test_a_recordings_gain_is_the_mean_of_its_clips(base):
    frames = 2 * CONTEXT
    documents = [document(length, n) for n, length in enumerate((5 * CONTEXT, 4 * CONTEXT - 1, frames - 1, frames))]
    result = run([base], documents, frames=frames, clips=2, batch_size=3)
    assert result.recordings == ["talk0", "talk1", "talk3"]
    assert result.clips == [2, 1, 1]
    kept = [documents[0], documents[1], documents[3]]
    rows = [row for batch in lay_out([2, 1, 1], 3, next_between=False) for row in batch]
    losses = losses_by_definition(base.model, kept, rows, frames)
    mean = [losses[[i for i, row in enumerate(rows) if row.own.recording == n]].nanmean(0) for n in range(3)]
    counted = torch.stack(mean)
    close = {"rtol": 1e-3, "atol": 1e-5}
    for presentation, place in (("second", 1), ("third", 3)):
        saved = torch.stack([(each[0] - each[place])[CONTEXT:].mean() for each in mean])
        torch.testing.assert_close(result.of("base", "updates on", presentation).values, saved, **close)
    (by_position,) = result.by_position
    assert by_position.losses.shape == (3, frames)
    torch.testing.assert_close(by_position.losses[:2], counted.mean(0)[:2], **close)
    assert by_position.losses[2, -1:].isnan().all()  # its late codebooks are never predicted
    torch.testing.assert_close(by_position.losses[2, :-1], counted.mean(0)[3, :-1], **close)


@pytest.mark.exhaustive  # a repetition
def test_the_same_call_gives_the_same_numbers():
    documents = [document(4 * CONTEXT, n) for n in range(3)]
    tested = model_with("ttt_linear")
    first, again = (run([tested], documents, clips=2, frames=2 * CONTEXT, conditions=CONDITIONS[:1]) for _ in range(2))
    for one, other in zip(first.gains, again.gains, strict=True):
        assert torch.equal(one.values, other.values)
        assert first.gain(one) == again.gain(other)


COUNTS = [([1] * 5, 2), ([2] * 3, 2), ([3, 3, 3, 3], 4), ([4, 4], 4), ([5, 1, 2, 4, 3], 3), ([7, 2, 2], 4), ([9, 1], 2)]


@pytest.mark.parametrize(("counts", "size"), COUNTS, ids=str)
def test_every_clip_is_presented_once_in_full_batches(counts, size):
    batches = lay_out(counts, size, next_between=False)
    clips = [row.own for batch in batches for row in batch]
    assert sorted(clips) == [(r, number) for r, count in enumerate(counts) for number in range(count)]
    assert len(batches) == max(1, sum(counts) // size)
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    for batch in batches:
        for row in batch:
            assert row.between.recording != row.own.recording
            assert row.between.number < counts[row.between.recording]


@pytest.mark.parametrize(("counts", "size"), COUNTS, ids=str)
def test_rows_of_a_batch_are_of_different_recordings_as_far_as_there_are_any(counts, size):
    batches = lay_out(counts, size, next_between=False)
    own = [[row.own.recording for row in batch] for batch in batches]
    # The fewest that can be had twice: each recording fills at most one row of each batch.
    if max(len(batch) for batch in own) <= len(counts):
        twice = sum(len(batch) - len(set(batch)) for batch in own)
        assert twice == sum(max(0, count - len(batches)) for count in counts)
    for batch in own:
        if max(map(batch.count, batch)) <= len(batch) // 2:
            assert all(one != before for one, before in zip(batch, [batch[-1], *batch], strict=False))


def test_memory_of_another_has_processed_others_only_where_they_can_be_kept_apart():
    apart = {"second": 0, "third": 0}
    assert processed_own(lay_out([3] * 5, 4, next_between=False)) == apart
    assert processed_own(lay_out([4] * 8, 8, next_between=False)) == apart
    # With one clip of each, B is what the next row of the batch has as A.
    assert processed_own(lay_out([1] * 8, 4, next_between=True)) == {"second": 0, "third": 6}
    assert processed_own(lay_out([4, 4], 4, next_between=False))["third"] == 8
    assert processed_own(lay_out([3, 1], 2, next_between=False))["second"] == 2


# Of the row before row 0, one back, and so on: what changes row 0's second and third presentation when it is another.
@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("back", "changed", "changes"),
    [(1, [0], "second"), (1, [2], "third"), (2, [1], "third"), (3, [0], "third"), (2, [2], ""), (3, [1, 2], ""),
     (4, [0, 1, 2, 3], "")],
)  # fmt: skip
def test_whose_memory_a_row_has(back, changed, changes):
    tested = model_with("ttt_linear", base_lr=1.0)
    frames = 3 * CONTEXT
    presented = torch.stack([document(4 * frames, n).codes for n in range(5)])
    other = presented.clone()
    for presentation in changed:
        other[-back, :, presentation * frames : (presentation + 1) * frames] = document(frames, 99).codes
    before, after = (
        evaluate_codes(tested, codes, "memory of another", every=frames)
        .audio[0]
        .unflatten(0, (4, frames))[:, REACH:-1]  # attention reaches so far into the presentation before
        for codes in (presented, other)
    )
    same = {"second": torch.equal(before[1], after[1]), "third": torch.equal(before[3], after[3])}
    assert same["second"] == (changes != "second")
    if changes != "second":  # what changes a second presentation may reach the third in other ways
        assert same["third"] == (changes != "third")


@pytest.mark.exhaustive  # the command line's report is read by default in test_cli.py
def test_a_report_names_the_presentations(base, tmp_path):
    models = [base, model_with("ttt_linear")]
    result = run(models, [document(2 * FRAMES, 0), document(FRAMES, 1), document(9, 2)], clips=2)
    write_recall(tmp_path, result, made_by="test")
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len(metrics["gains"]) == 2 * (1 + len(CONDITIONS))
    assert (metrics["pieces_asked_for"], metrics["pieces_by_recording"]) == (2, [2, 1])
    assert metrics["left_out"] == ["talk2 (9 frames)"]
    first, *_ = metrics["loss_by_position"]
    assert {len(first[presentation]) for presentation in ("first", "second", "third")} == {FRAMES}
    assert (first["second"][-1] is None, first["third"][-1]) == (False, None)
    report = (tmp_path / "report.md").read_text()
    assert "| ttt_linear, updates off | third |" in report
    assert "3 clips of 24 frames, up to 2 of each recording" in report
    assert metrics["memory_of_another_had_heard_own"]["third"] == 3
    assert (
        "third presentation: in 3 of 3 clips the other memory has already processed the clip's own recording" in report
    )
    assert (tmp_path / "recall_by_position.png").stat().st_size > 5_000


def test_a_report_of_the_base_alone_says_nothing_of_memories(base, tmp_path):
    write_recall(tmp_path, run([base]), made_by="test")
    assert json.loads((tmp_path / "metrics.json").read_text())["memory_of_another_had_heard_own"] is None
    assert "Memory of another" not in (tmp_path / "report.md").read_text()


def test_recordings_that_are_too_short_or_too_few_are_refused(base):
    with pytest.raises(ConfigError, match=r"two recordings of 24 frames or more, and 1 of 2"):
        run([base], [document(FRAMES, 0), document(FRAMES - 1, 1)])
    with pytest.raises(ConfigError, match="A clip of 9 frames has none beyond the attention context of 8"):
        run([base], frames=CONTEXT + 1)


def test_no_clips_are_refused(base):
    with pytest.raises(ConfigError, match=r"0 clips of each recording: give 1 or more"):
        run([base], clips=0)


def test_clips_do_not_make_up_for_a_recording_of_another(base):
    with pytest.raises(ConfigError, match=r"two recordings of 24 frames or more, and 1 of 1 are as long"):
        run([base], [document(10 * FRAMES, 0)], clips=10)
