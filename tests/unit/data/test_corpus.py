"""A corpus serves the same tokens from manifests and from shards, and knows what it had to leave out."""

from __future__ import annotations

import pytest
import torch

from moshi_ttt.data.corpus import SegmentError, open_corpus
from moshi_ttt.data.problems import DataError
from moshi_ttt.data.shards import write_shards
from moshi_ttt.data.text import read_words

from .conftest import cut_off, write_manifest


def every_segment(corpus):
    return {
        (number, r, s): corpus.codes(number, r, s)
        for number, source in enumerate(corpus.sources)
        for r, recording in enumerate(source.recordings)
        for s in range(recording.segments)
    }


def test_recordings_and_segments(recordings, codec):
    corpus = open_corpus(str(recordings), codec, frames=16)
    (source,) = corpus.sources
    assert [(r.name, r.frames, r.segments) for r in source.recordings] == [
        ("talk0.wav", 61, 4), ("talk1.wav", 20, 2), ("talk2.wav", 33, 3),
    ]  # fmt: skip
    assert source.recordings[1].where == f"{recordings}:2"
    assert source.num_segments == corpus.num_segments == 9
    assert corpus.seconds == pytest.approx(114 / 12.5)
    assert (corpus.rows, corpus.zero_token, corpus.encodes_on, corpus.problems) == (17, -1, "cpu", ())
    located = [source.locate(index) for index in range(9)]
    assert located == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert [source.index(*place) for place in located] == list(range(9))


def test_codes_are_text_then_audio_then_nothing(recordings, codec):
    corpus = open_corpus(str(recordings), codec, frames=16)
    folder = recordings.parent
    text = codec.encode_text(read_words(folder / "talk0.json"), 61)
    codes = corpus.codes(0, 0, 3)
    assert codes.dtype == torch.int64
    assert codes.shape == (17, 16)
    assert torch.equal(codes[0, :13], text[48:])
    assert torch.equal(codes[1:, :13], codec.encode_segment(codec.read_segment(folder / "talk0.wav", 48, 16)))
    assert (codes[:, 13:] == -1).all()
    assert (corpus.codes(0, 0, 2) >= 0).all()


@pytest.mark.parametrize("frames", [7, 16, 100])
def test_shards_have_the_numbers_of_the_manifest_bit_for_bit(recordings, codec, tmp_path, frames):
    write_shards(str(recordings), tmp_path / "shards", codec, frames=frames, shard_size=2)
    read = open_corpus(str(recordings), codec, frames=frames)
    encoded = open_corpus(str(tmp_path / "shards"), codec, frames=frames)
    ours, theirs = every_segment(read), every_segment(encoded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [r.where for r in read.sources[0].recordings] == [r.where for r in encoded.sources[0].recordings]
    assert encoded.encodes_on is None


def test_shards_can_be_cut_anew(recordings, codec, tmp_path):
    write_shards(str(recordings), tmp_path / "shards", codec, frames=16)
    long = every_segment(open_corpus(str(tmp_path / "shards"), codec, frames=61))
    short = every_segment(open_corpus(str(tmp_path / "shards"), codec, frames=10))
    joined = torch.cat([short[0, 0, segment] for segment in range(7)], dim=1)
    assert torch.equal(joined[:, :61], long[0, 0, 0])


def test_transcripts_are_used_as_asked(recordings, codec, tmp_path):
    folder = recordings.parent
    (folder / "talk1.json").unlink()
    optional = open_corpus(str(recordings), codec, frames=16, transcripts="optional")
    assert (optional.codes(0, 0, 0)[0] != -1).all()
    assert (optional.codes(0, 1, 0)[0] == -1).all()
    none = open_corpus(str(recordings), codec, frames=16, transcripts="none")
    assert (none.codes(0, 0, 0)[0] == -1).all()
    assert torch.equal(none.codes(0, 0, 0)[1:], optional.codes(0, 0, 0)[1:])
    write_shards(str(recordings), tmp_path / "shards", codec, frames=16, transcripts="optional")
    for transcripts, expected in (("optional", optional), ("none", none)):
        encoded = open_corpus(str(tmp_path / "shards"), codec, frames=16, transcripts=transcripts)
        assert all(torch.equal(encoded.codes(0, r, 0), expected.codes(0, r, 0)) for r in range(3))
    with pytest.raises(DataError, match=r"train.jsonl:2: talk1.wav has no text in .*index.json"):
        open_corpus(str(tmp_path / "shards"), codec, frames=16)
    some = open_corpus(str(tmp_path / "shards"), codec, frames=16, max_bad_share=0.4)
    assert [r.name for r in some.sources[0].recordings] == ["talk0.wav", "talk2.wav"]
    assert (some.codes(0, 1, 0)[0] != -1).all()


def test_several_sources_with_weights(recordings, codec, tmp_path):
    write_shards(str(recordings), tmp_path / "shards", codec, frames=16)
    many = tmp_path / "many"
    many.mkdir()
    lines = [{"path": "../talk1.wav", "duration": 1.57}]
    write_manifest(many / "a.jsonl", lines)
    write_manifest(many / "b.jsonl", lines)
    corpus = open_corpus(f"{tmp_path / 'shards'}:3,{many}", codec, frames=16)
    assert [source.weight for source in corpus.sources] == [3.0, 1.0]
    assert [source.num_segments for source in corpus.sources] == [9, 4]
    assert torch.equal(corpus.codes(0, 1, 1), corpus.codes(1, 1, 1))


def test_few_problems_are_kept_for_the_caller(recordings, codec):
    good = recordings.read_text()
    recordings.write_text(good + "nonsense\n")
    with pytest.raises(DataError, match=r"1 of 4 recordings \(25.0%\)[\s\S]*train.jsonl:4: is not JSON"):
        open_corpus(str(recordings), codec, frames=16)
    corpus = open_corpus(str(recordings), codec, frames=16, max_bad_share=0.25)
    assert [problem.line for problem in corpus.problems] == [4]
    assert len(corpus.sources[0].recordings) == 3


def test_a_source_without_a_usable_recording_raises(recordings, codec, tmp_path):
    other = write_manifest(tmp_path / "other.jsonl", ["nonsense"])
    with pytest.raises(DataError, match="No recording is left"):
        open_corpus(str(other), codec, frames=16, max_bad_share=0.99)
    with pytest.raises(DataError, match=r"other.jsonl has no usable recording"):
        open_corpus(f"{recordings},{other}", codec, frames=16, max_bad_share=0.9)
    with pytest.raises(DataError, match="lists no recordings"):
        open_corpus(str(write_manifest(tmp_path / "empty.jsonl", [])), codec, frames=16)


def test_segments_of_no_frames_raise(recordings, codec):
    with pytest.raises(DataError, match="duration_sec"):
        open_corpus(str(recordings), codec, frames=0)


def test_a_recording_that_breaks_later_raises_where_it_breaks(recordings, codec):
    corpus = open_corpus(str(recordings), codec, frames=16)
    cut_off(recordings.parent / "talk2.wav", 0.6)
    (recordings.parent / "talk1.json").write_text("{")
    assert corpus.codes(0, 2, 0).shape == (17, 16)
    with pytest.raises(SegmentError, match=r"train.jsonl:3: .*talk2.wav") as error:
        corpus.codes(0, 2, 1)
    assert (error.value.problem.line, error.value.problem.file) == (3, recordings)
    with pytest.raises(SegmentError, match=r"train.jsonl:2: transcript"):
        corpus.codes(0, 1, 0)


def test_a_shard_that_goes_away_raises_with_the_recordings_line(recordings, codec, tmp_path):
    write_shards(str(recordings), tmp_path / "shards", codec, frames=16)
    corpus = open_corpus(str(tmp_path / "shards"), codec, frames=16)
    (tmp_path / "shards" / "shard_00000.safetensors").unlink()
    with pytest.raises(SegmentError, match=r"train.jsonl:2: .*shard_00000.safetensors cannot be read"):
        corpus.codes(0, 1, 0)
