"""Recall: nothing is worth nothing, a memory that must help helps, and what attention does is kept out."""

from __future__ import annotations

import json

import pytest
import torch

from moshi_ttt.apps.evaluate.recall import evaluate
from moshi_ttt.apps.evaluate.reporting import write_recall
from moshi_ttt.apps.evaluate.subjects import CONDITIONS
from moshi_ttt.apps.teacher_forcing import stream_losses
from moshi_ttt.core.errors import ConfigError

from .conftest import CONTEXT, document, subject_with

FRAMES = 5 * CONTEXT


def run(subjects, documents=None, **changes):
    documents = documents or [document(FRAMES + n, n) for n in range(3)]
    chosen = {"frames": FRAMES, "conditions": CONDITIONS, "batch_size": 2, **changes}
    return evaluate(subjects, documents, **chosen)


def test_without_memory_there_is_nothing_to_recall(base):
    # Three layers of attention over 8 frames reach back 24; what is beyond must be the same both times.
    result = run([base], frames=FRAMES)
    gain = result.gain(result.of("base", "updates on", "second"))
    assert abs(gain.value) < 0.02


def test_what_is_counted_is_what_was_heard_again(base):
    subject = subject_with("ttt_mlp", base_lr=1.0, gate={"init": 1.0})
    result = run([base, subject])
    on = result.of("ttt_mlp", "updates on", "second").values
    off = result.of("ttt_mlp", "updates off", "second").values
    assert on.shape == (3,)
    assert (on - off).abs().max() > 1e-3  # what it learned changes what it predicts
    reset = result.of("ttt_mlp", "memory reset", "second").values
    assert (on - reset).abs().max() > 1e-3  # so does what it still knows when the second hearing begins


def test_gains_are_differences_by_recording(base):
    documents = [document(FRAMES, n) for n in range(2)]
    result = run([base], documents)
    for row, other in ((0, 1), (1, 0)):
        piece, between = documents[row].codes, documents[other].codes
        losses = stream_losses(base.model, torch.cat([piece, piece, between, piece], 1)[None]).audio[0]
        first, second, _, third = losses.unflatten(0, (4, FRAMES))[:, CONTEXT:]
        for hearing, values in (("second", second), ("third", third)):
            actual = result.of("base", "updates on", hearing).values[row]
            torch.testing.assert_close(actual, (first - values).nanmean(), rtol=1e-3, atol=1e-5)


def test_recordings_that_are_too_short_or_too_few_are_refused(base):
    with pytest.raises(ConfigError, match=r"two recordings of 40 frames or more, and 1 of 2"):
        run([base], [document(FRAMES, 0), document(FRAMES - 1, 1)])
    with pytest.raises(ConfigError, match="none is left beyond the attention's context of 8"):
        run([base], frames=CONTEXT + 1)


def test_a_report_names_the_hearings(base, tmp_path):
    result = run([base, subject_with("ttt_linear")])
    write_recall(tmp_path, result, made_by="test")
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len(metrics["gains"]) == 2 * (1 + len(CONDITIONS))
    report = (tmp_path / "report.md").read_text()
    assert "| ttt_linear, updates off | third |" in report
