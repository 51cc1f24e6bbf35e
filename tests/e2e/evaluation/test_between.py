"""How long a memory lasts: a clip, other clips, the clip again; each N as if it were presented alone."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation import between
from moshi_ttt.evaluation.between import BetweenOptions, evaluate, read_counts
from moshi_ttt.evaluation.between_report import write_between
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import evaluate_codes
from tests.unit.evaluation.conftest import CONTEXT, document, model_with

FRAMES = 3 * CONTEXT
COUNTS = (1, 2, 4)
INTERLUDES = [document(2 * FRAMES + 3, 10 + n) for n in range(3)]  # six clips


def run(models, documents=None, interludes=INTERLUDES, on_batch=lambda: None, **changes):
    documents = documents or [document(2 * FRAMES, n) for n in range(3)]
    options = BetweenOptions(**{"counts": COUNTS, "frames": FRAMES, "batch_size": 8, **changes})
    return evaluate(models, documents, interludes, options, on_batch=on_batch)


@pytest.fixture
def loud():
    return model_with("ttt_mlp", base_lr=1.0, gate={"init": 1.0})


def clips_of(documents):
    return [each.codes[:, n : n + FRAMES] for each in documents for n in range(0, each.frames - FRAMES + 1, FRAMES)]


def by_definition(tested, base, documents, count, *, volume=1.0, seed=0):
    """Gain, saved and once of each document's first clip: every row and every count presented alone, in segments."""
    clips = clips_of(INTERLUDES)
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for row, own in enumerate(each.codes[:, :FRAMES] for each in documents):
        start = row * len(clips) // len(documents)
        others = [clips[order[(start + n) % len(clips)]] for n in range(count)]
        losses_of = torch.cat([own, *others, own], dim=1)[None]
        losses = [
            evaluate_codes(each, losses_of, "updates on", every=FRAMES, segments=FRAMES, volume=at).audio[0]
            .unflatten(0, (count + 2, FRAMES))[:, CONTEXT:].nanmean(1)
            for each, at in ((tested, volume), (base, 1.0))
        ]  # fmt: skip
        own_loss, bases = losses
        gain = (own_loss[0] - own_loss[-1]) - (bases[0] - bases[-1])
        found.append((gain, bases[-1] - own_loss[-1], (bases - own_loss)[1:-1].mean()))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("volume", [1.0, 0.5])
def test_each_count_is_as_if_it_were_presented_alone(base, loud, volume):
    documents = [document(2 * FRAMES, n) for n in range(3)]
    result = run([base, loud], documents, volumes=(volume,))
    assert [each.count for each in result.after] == list(COUNTS)
    for each in result.after:
        assert each.volume == volume
        wanted = by_definition(loud, base, documents, each.count, volume=volume)
        for name, expected in zip(between.FIGURES, wanted, strict=True):
            torch.testing.assert_close(getattr(each, name), expected, rtol=1e-3, atol=1e-5)
    assert result.after[0].gain.abs().max() > 1e-3  # or all of it would be about nothing


def test_what_lies_between_counts(base, loud):
    near, _, far = run([base, loud]).after
    assert not torch.equal(near.gain, far.gain)
    assert not torch.equal(near.once, far.once)


def test_without_memory_nothing_is_gained(base):
    other = model_with(None, name="none")
    for each in run([base, other]).after:
        for name in between.FIGURES:
            assert not getattr(each, name).any()


def test_batches_do_not_change_what_a_row_is_presented(base, loud):
    for one, other in zip(run([base, loud]).after, run([base, loud], batch_size=2).after, strict=True):
        for name in between.FIGURES:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-5)


def test_a_recordings_figure_is_the_mean_of_its_clips(base, loud):
    documents = [document(2 * FRAMES, 0), document(FRAMES, 1), document(FRAMES - 1, 2)]
    result = run([base, loud], documents, clips=2)
    assert (result.clips, result.recordings) == ([2, 1], ["talk0", "talk1"])
    assert result.left_out == ["talk2 (23 frames)"]
    parts = [Document(f"part{n}", clip) for n, clip in enumerate(clips_of(documents))]
    for each, apart in zip(result.after, run([base, loud], parts).after, strict=True):
        torch.testing.assert_close(each.gain[0], apart.gain[:2].mean(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(each.gain[1], apart.gain[2], rtol=1e-3, atol=1e-5)


def test_it_takes_one_batch_for_all_recordings_and_counts(base, loud):
    losses_of = []
    run([base, loud], volumes=(0.5, 1.0), on_batch=lambda: losses_of.append(None))
    assert len(losses_of) == 3  # the base, and each volume


def test_the_seed_orders_the_interludes(base, loud):
    first, again, other = (run([base, loud], seed=seed).after[0].gain for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_models_without_blocks_have_no_volume(base, loud):
    other = model_with(None, name="none")
    after = run([base, other, loud], volumes=(0.5, 1.0), counts=(1,)).after
    assert [(each.model, each.volume) for each in after] == [("none", 1.0), ("ttt_mlp", 0.5), ("ttt_mlp", 1.0)]


def test_a_report_has_a_table_and_a_figure(base, loud, tmp_path):
    result = run([base, loud], volumes=(0.5, 1.0))
    write_between(tmp_path, result, made_by="test", frame_seconds=0.08)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    rows = metrics["between"]
    assert [(each["volume"], each["clips_between"]) for each in rows] == [(v, n) for v in (0.5, 1.0) for n in COUNTS]
    for each, after in zip(rows, result.after, strict=True):
        assert math.isclose(each["seconds_between"], each["clips_between"] * FRAMES * 0.08)
        assert each["gain_by_recording"] == after.gain.tolist()
        interval = each["gain_beyond_base"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        assert math.isclose(interval["value"], float(after.gain.mean()), abs_tol=1e-9)
    assert (metrics["interludes"], metrics["attention_restarts"]) == (6, True)
    report = (tmp_path / "report.md").read_text()
    assert "| ttt_mlp | 0.5 | 4 | 8 s | " in report
    assert report.count("| ttt_mlp |") == len(rows)
    assert (tmp_path / "recall_by_interval.png").stat().st_size > 10_000


@pytest.mark.parametrize(("texts", "counts"), [(["1,6,47"], (1, 6, 47)), (["6, 1"], (1, 6)), (["2", "1"], (1, 2))])
def test_lists_are_read(texts, counts):
    assert read_counts(texts) == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "'' is no number of clips"), ("1,,2", "'' is no number"), ("0", "'0' is no number"), ("-1", "'-1' is no"),
     ("1.5", "'1.5' is no"), ("1_0", "'1_0' is no"), ("²", "'²' is no"), ("one", "whole numbers from 1"),
     ("1,01", "1 is given twice")],
)  # fmt: skip
def test_odd_lists_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        read_counts([text])


def test_too_few_interludes_are_refused(base, loud):
    assert run([base, loud], counts=(6,)).interludes == 6
    with pytest.raises(ConfigError, match="7 other clips of 24 frames are asked for, and --interludes has 6"):
        run([base, loud], counts=(1, 7))
    with pytest.raises(ConfigError, match="1 other clips of 24 frames are asked for, and --interludes has 0"):
        run([base, loud], interludes=[document(FRAMES - 1, 10)], counts=(1,))


@pytest.mark.parametrize("change", ["nothing", "its name", "its text", "its tokens"])
def test_interludes_that_are_under_test_are_refused(base, loud, change):
    under_test = document(2 * FRAMES, 1)
    codes, name = under_test.codes.clone(), under_test.name
    if change == "its name":
        name = "a copy"
    elif change == "its text":
        name, codes[0] = "a copy", -1
    elif change == "its tokens":  # as when it was encoded in other segments
        codes[1, 5] += 1
    losses_of = []
    with pytest.raises(ConfigError, match=f"1 of the interludes are recordings under test, the first {name}"):
        run([base, loud], interludes=[*INTERLUDES, Document(name, codes)], on_batch=lambda: losses_of.append(None))
    assert losses_of == []


def test_a_recording_too_short_to_be_tested_is_still_no_interlude(base, loud):
    documents = [document(2 * FRAMES, 0), document(2 * FRAMES, 1), document(FRAMES - 1, 2)]
    with pytest.raises(ConfigError, match="under test, the first talk2"):
        run([base, loud], documents, [*INTERLUDES, documents[2]])


def test_the_base_model_alone_and_volumes_of_nobody_are_refused(base):
    with pytest.raises(ConfigError, match="--between compares adapters with the base model"):
        run([base])
    with pytest.raises(ConfigError, match="no volume without blocks"):
        run([base, model_with(None, name="none")], volumes=(0.5,))


def test_what_recall_refuses_is_refused(base, loud):
    with pytest.raises(ConfigError, match="A clip of 9 frames has none beyond the attention context of 8"):
        run([base, loud], frames=CONTEXT + 1)
    with pytest.raises(ConfigError, match="two recordings of 24 frames or more, and 1 of 1"):
        run([base, loud], [document(FRAMES, 0)])
