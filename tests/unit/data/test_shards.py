"""Pre-encoded shards: what is written, and every folder that must not be read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_ttt.data.problems import DataError
from moshi_ttt.data.shards import (
    check_codec,
    read_index,
    read_tokens,
    rearrange_shards,
    write_shards,
)
from moshi_ttt.system.output_folder import OutputError

from .conftest import FRAME, cut_off, write_audio, write_manifest


@pytest.fixture
def shards(recordings, codec, tmp_path):
    write_shards(str(recordings), tmp_path / "shards", codec, frames=16, shard_size=2)
    return tmp_path / "shards"


def test_the_folder(recordings, codec, tmp_path):
    done = []
    summary = write_shards(
        str(recordings), tmp_path / "new" / "shards", codec, frames=16, shard_size=2,
        progress=lambda *each: done.append(each),
    )  # fmt: skip
    folder = tmp_path / "new" / "shards"
    assert done == [(1, 3, "talk0.wav"), (2, 3, "talk1.wav"), (3, 3, "talk2.wav")]
    assert (summary.recordings, summary.frames, summary.shards, summary.problems) == (3, 114, 2, ())
    assert summary.seconds == pytest.approx(114 / 12.5)
    assert summary.bytes == sum(path.stat().st_size for path in folder.iterdir() if path.name != ".made_by.json")
    names = [".made_by.json", "index.json", "shard_00000.safetensors", "shard_00001.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    index = read_index(folder)
    assert (index.frames, index.channels, index.codebooks, index.frame_rate) == (16, 2, 8, 12.5)
    assert index.fingerprint == codec.fingerprint()
    assert [(each.name, each.frames, each.has_text, each.line) for each in index.recordings] == [
        ("talk0.wav", 61, True, 1), ("talk1.wav", 20, True, 2), ("talk2.wav", 33, True, 3),
    ]  # fmt: skip
    tensors = load_file(folder / index.recordings[0].shard)
    audio, text = (tensors[f"{index.recordings[0].key}.{kind}"] for kind in ("audio", "text"))
    assert (audio.dtype, audio.shape) == (torch.int16, (16, 61))
    assert (text.dtype, text.shape) == (torch.int32, (61,))


def test_tokens_are_read_by_the_frame(shards, codec, recordings):
    recording = read_index(shards).recordings[2]
    audio, text = read_tokens(shards, recording, 16, 32, text=True)
    assert audio.dtype == text.dtype == torch.int64
    expected = codec.encode_segment(codec.read_segment(recordings.parent / "talk2.wav", 16, 16))
    assert torch.equal(audio, expected)
    assert read_tokens(shards, recording, 32, 48, text=True)[1].shape == (1,)
    assert read_tokens(shards, recording, 0, 4, text=False)[1] is None


def test_without_transcripts(recordings, codec, tmp_path):
    (recordings.parent / "talk1.json").unlink()
    write_shards(str(recordings), tmp_path / "some", codec, frames=16, transcripts="optional")
    assert [each.has_text for each in read_index(tmp_path / "some").recordings] == [True, False, True]
    write_shards(str(recordings), tmp_path / "none", codec, frames=16, transcripts="none")
    assert not any(each.has_text for each in read_index(tmp_path / "none").recordings)
    with pytest.raises(DataError, match=r"talk1\.wav has no transcript"):
        write_shards(str(recordings), tmp_path / "all", codec, frames=16)
    assert not (tmp_path / "all").exists()


def test_a_recording_that_cannot_be_read_counts_as_bad(recordings, codec, tmp_path):
    cut_off(recordings.parent / "talk0.wav", 0.5)
    with pytest.raises(DataError, match=r"1 of 3 recordings .*\n.*:1: .*cut off"):
        write_shards(str(recordings), tmp_path / "out", codec, frames=16)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    summary = write_shards(str(recordings), tmp_path / "out", codec, frames=16, max_bad_share=0.4)
    assert summary.recordings == 2
    assert [problem.line for problem in summary.problems] == [1]
    assert [each.line for each in read_index(tmp_path / "out").recordings] == [2, 3]


def test_what_cannot_be_encoded_raises(recordings, shards, codec, tmp_path):
    manifest = str(recordings)
    with pytest.raises(DataError, match="encoded already"):
        write_shards(str(shards), tmp_path / "out", codec, frames=16)
    with pytest.raises(DataError, match="weight 2 means nothing"):
        write_shards(manifest + ":2", tmp_path / "out", codec, frames=16)
    with pytest.raises(DataError, match="frames = 0"):
        write_shards(manifest, tmp_path / "out", codec, frames=0)
    with pytest.raises(OutputError, match="not empty"):
        write_shards(manifest, shards, codec, frames=16)
    assert not (tmp_path / "out").exists()


def test_a_codec_for_one_channel_refuses_stereo(recordings, codec, tmp_path):
    one = dataclasses.replace(codec, channels=1)
    with pytest.raises(DataError, match="Mix it down to mono"):
        write_shards(str(recordings), tmp_path / "out", one, frames=16)


def change_index(folder, **values):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format_version": 2}, "format_version 2, and this moshi-ttt reads 1"),
        ({"frames": 0}, "frames = 0"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"recordings": []}, "recordings"),
        ({"codebooks": 4}, "does not hold what index.json says"),
    ],
)
def test_an_index_that_does_not_fit_raises(shards, values, said):
    change_index(shards, **values)
    with pytest.raises(DataError) as error:
        read_index(shards)
    assert said in str(error.value)
    assert "Encode the recordings again" in str(error.value)


def test_a_shard_outside_the_folder_is_refused(shards):
    recordings = json.loads((shards / "index.json").read_text())["recordings"]
    change_index(shards, recordings=[{**recordings[0], "shard": "../shard_00000.safetensors"}])
    with pytest.raises(DataError, match="shard"):
        read_index(shards)


@pytest.mark.parametrize("contents", ["", "[]", "{", "{}"])
def test_an_index_that_is_none_raises(shards, contents):
    (shards / "index.json").write_text(contents)
    with pytest.raises(DataError, match="Encode the recordings again"):
        read_index(shards)


def test_shards_that_are_missing_damaged_or_exchanged_raise(shards):
    first, second = (shards / f"shard_0000{number}.safetensors" for number in (0, 1))
    contents = first.read_bytes()
    first.write_bytes(contents[:-10])
    with pytest.raises(DataError, match=r"shard_00000.safetensors cannot be read"):
        read_index(shards)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"does not hold what index.json says: 00000000.audio, 00000000.text"):
        read_index(shards)
    first.write_bytes(contents)
    tensors = load_file(first)
    save_file({**tensors, "more": torch.zeros(1)}, first)
    with pytest.raises(DataError, match="says: more"):
        read_index(shards)
    save_file({**tensors, "00000001.audio": tensors["00000001.audio"].int()}, first)
    with pytest.raises(DataError, match=r"says: 00000001\.audio"):
        read_index(shards)
    first.unlink()
    with pytest.raises(DataError, match=r"shard_00000.safetensors cannot be read"):
        read_index(shards)


def test_shards_of_another_codec_raise(shards, codec):
    index = read_index(shards)
    check_codec(shards, index, codec, codec.fingerprint())
    with pytest.raises(DataError, match=r"another Mimi or tokenizer.*Encode the recordings again with this model's"):
        check_codec(shards, index, codec, "0" * 64)
    one = dataclasses.replace(codec, channels=1)
    with pytest.raises(DataError, match=r"2 channels of 8 codebooks at 12\.5 Hz; the model has 1 channels"):
        check_codec(shards, index, one, one.fingerprint())


def test_many_recordings_fill_shards(tmp_path, codec, speech):
    write_audio(tmp_path / "a.wav", speech[None, : 2 * FRAME])
    manifest = write_manifest(tmp_path / "t.jsonl", [{"path": "a.wav", "duration": 0.16}] * 5)
    summary = write_shards(str(manifest), tmp_path / "out", codec, frames=16, transcripts="none", shard_size=2)
    assert summary.shards == 3
    shards = [each.shard for each in read_index(tmp_path / "out").recordings]
    assert shards == [f"shard_0000{number}.safetensors" for number in (0, 0, 1, 1, 2)]


# ---- shards of other shards' frames


def test_frames_are_rearranged(shards, tmp_path):
    def backwards_and_again(length):
        if length > 30:
            yield torch.arange(9, -1, -1).repeat(2)
            yield torch.arange(length - 5, length)

    index = rearrange_shards(shards, tmp_path / "new", backwards_and_again, shard_size=3)
    assert index == read_index(tmp_path / "new")
    source = read_index(shards)
    assert (index.fingerprint, index.frames) == (source.fingerprint, source.frames)
    names = [(each.name, each.frames, each.line) for each in index.recordings]
    assert names == [("talk0.wav#0", 20, 1), ("talk0.wav#1", 5, 1), ("talk2.wav#0", 20, 3), ("talk2.wav#1", 5, 3)]
    audio, text = read_tokens(shards, source.recordings[2], 0, 10, text=True)
    found = read_tokens(tmp_path / "new", index.recordings[2], 0, 20, text=True)
    assert torch.equal(found[0], audio.flip(1).repeat(1, 2))
    assert torch.equal(found[1], text.flip(0).repeat(2))


def test_no_clip_at_all_raises_and_leaves_nothing(shards, tmp_path):
    with pytest.raises(DataError, match="no clip can be made of any recording; the longest has 61 frames"):
        rearrange_shards(shards, tmp_path / "new", lambda length: [])
    assert not (tmp_path / "new").exists()


def test_rearranging_into_a_folder_that_is_there_raises(shards, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(OutputError, match="not empty"):
        rearrange_shards(shards, tmp_path / "new", lambda length: [torch.arange(3)])
