"""What is measured of one model, beside references that pass one clip after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.host import CarriedState
from moshi_ttt.evaluation.documents import Document
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.evaluation.teacher_forcing import forward_losses
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from study import measures
from study.jobs import StudyError
from tests.unit.evaluation.conftest import CONTEXT, document, model_with

CLIP = 12


@pytest.fixture(scope="module")
def memory() -> ModelUnderTest:
    return model_with("gating_mlp", noise=0.3)


@pytest.fixture(scope="module")
def recordings() -> list[Document]:
    return [document(frames, seed) for seed, frames in enumerate((26, 50, 30))]


def passes(tested: ModelUnderTest, clips: list[Tensor], volume: float = 1.0) -> list[Tensor]:
    """``[T]`` each: the losses of clips ``[Q, T]`` of one stream, a forward pass each, memory carried."""
    state: CarriedState | None = None
    found = []
    with MOSHI_HOST.volume(tested.model, volume):
        for clip in clips:
            losses, state = forward_losses(tested.model, clip[None], MOSHI_HOST, state)
            found.append(losses.audio[0])
    return found


def test_bucket_means_are_of_the_frames_in_them():
    losses = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0, 16.0], [9.0, 1.0, math.nan, math.nan, math.nan, math.nan]])
    means = measures.bucket_means(losses, (1, 2, 4), 1)
    assert torch.equal(means[0], torch.tensor([1.0, 3.0, 12.5]))
    assert means[1, 0] == 1.0
    assert means[1, 1:].isnan().all()


def test_a_bucket_with_too_few_frames_does_not_count():
    losses = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
    assert measures.bucket_means(losses, (0, 2), 2).isnan().tolist() == [[False, True]]
    assert measures.bucket_means(losses, (0, 2), 1).tolist() == [[1.5, 3.0]]


def test_a_bucket_beyond_all_recordings_is_empty():
    assert measures.bucket_means(torch.ones(1, 2), (1, 2, 4), 1).isnan().tolist() == [[False, True, True]]


def test_recordings_are_joined_until_they_are_long_enough(recordings):
    found = measures.joined([*recordings, document(20, 9)], 60)
    assert [each.name for each in found] == ["talk0 + talk1"], "what is left has 50 frames"
    assert torch.equal(found[0].codes, torch.cat([recordings[0].codes, recordings[1].codes], dim=1))
    assert [each.name for each in measures.joined(recordings, 26)] == ["talk0", "talk1", "talk2"]


@pytest.mark.parametrize("volume", [1.0, 0.5])
def test_once_is_each_recording_alone_in_segments(memory, recordings, volume):
    found = measures.once(
        memory, recordings, condition="updates on", volume=volume, segment=2 * CLIP, buckets=(6, 24), least=3,
        batch_size=2,
    )  # fmt: skip
    for row, recording in zip(found, recordings, strict=True):
        padded = F.pad(recording.codes, (0, 50 - recording.frames), value=memory.padding)  # as in a batch of all
        losses = torch.cat(passes(memory, list(padded.split(2 * CLIP, dim=1)), volume))[: recording.frames]
        parts = [losses[6:], losses[6:24], losses[24:]]
        expected = torch.stack([part.nanmean() for part in parts])
        expected[2] = expected[2] if len(parts[2]) >= 3 else math.nan
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert found[0, 2].isnan(), "26 frames: two in the last bucket"


def test_recall_is_of_each_presentation_beyond_the_context(memory, recordings):
    found = measures.recall(memory, recordings, condition="updates on", volume=1.0, frames=CLIP, clips=1, batch_size=8)
    firsts = [recording.codes[:, :CLIP] for recording in recordings]
    for number, own in enumerate(firsts):
        other = firsts[(number + 1) % 3]
        losses = {}
        for between in (other, firsts[(number + 2) % 3]):
            losses[id(between)] = torch.stack(
                [each[CONTEXT:].nanmean() for each in passes(memory, [own, own, between, own])]
            )
        assert any(torch.allclose(found[number], each, atol=1e-5, rtol=0) for each in losses.values())
    assert (found[:, 1] - found[:, 0]).abs().max() > 1e-4, "the memory changes the second presentation"


def test_without_updates_a_second_presentation_is_as_the_first(memory, recordings):
    found = measures.recall(memory, recordings, condition="updates off", volume=1.0, frames=CLIP, clips=2, batch_size=8)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 3])


def test_held_presents_each_clip_again_from_the_state_after_all(memory, recordings):
    first, again = measures.held(memory, recordings, volume=0.5, frames=CLIP, clips=2, counts=(1, 3))
    pool = [recording.codes[:, start : start + CLIP] for start in (0, CLIP) for recording in recordings]
    for row in range(3):
        for place, count in enumerate((1, 3)):
            heard = [pool[(row + each) % len(pool)] for each in range(count)]
            alone = [each[CONTEXT:].nanmean() for each in passes(memory, heard, 0.5)]
            later = [passes(memory, [*heard, clip], 0.5)[-1][CONTEXT:].nanmean() for clip in heard]
            assert first[row, place] == pytest.approx(float(torch.stack(alone).mean()), abs=1e-5)
            assert again[row, place] == pytest.approx(float(torch.stack(later).mean()), abs=1e-5)


def test_more_clips_than_there_are_cannot_be_held(memory, recordings):
    with pytest.raises(StudyError, match="9 clips held at once: the recordings have 6"):
        measures.held(memory, recordings, volume=1.0, frames=CLIP, clips=2, counts=(9,))


def test_one_stream_is_whole_recordings_in_an_order_of_each_row(memory, recordings):
    found = measures.hour(memory, recordings, volume=1.0, rows=2, frames=96, part=24, segment=2 * CLIP)
    assert found.shape == (2, 4)
    for row in range(2):
        order = torch.randperm(3, generator=torch.Generator().manual_seed(row)).tolist()
        codes = torch.cat([recordings[number].codes for number in order], dim=1)[:, :96]
        losses = torch.cat(passes(memory, list(codes.split(2 * CLIP, dim=1))))
        expected = torch.stack([part.nanmean() for part in losses.split(24)])
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_a_stream_ends_where_there_are_no_more_recordings(memory, recordings):
    found = measures.hour(memory, recordings, volume=1.0, rows=2, frames=1_000, part=50, segment=2 * CLIP)
    assert found.shape == (2, 2), "106 frames; what is left of the third part is less than half of it"


def test_numbers_for_json():
    assert measures.plain(torch.tensor([[1.23456789, math.nan]])) == [[1.234568, None]]
