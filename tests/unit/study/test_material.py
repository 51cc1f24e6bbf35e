"""Training material: clips followed by themselves, in order and in random order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.data.problems import DataError
from moshi_ttt.data.shards import read_index, read_tokens
from study.material import presented_twice, shuffled_twice

LENGTH = 50


@pytest.fixture
def source(tmp_path) -> Path:
    """One recording whose codes count its frames."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"00000000.audio": torch.arange(LENGTH, dtype=torch.int16)[None]}, folder / "shard_00000.safetensors")
    recording = {
        "name": "talk.wav", "shard": "shard_00000.safetensors", "key": "00000000", "frames": LENGTH, "has_text": False,
        "manifest": "train.jsonl", "line": 1,
    }  # fmt: skip
    index = {
        "format_version": 1, "frames": 25, "fingerprint": "x", "frame_rate": 12.5, "codebooks": 1, "channels": 1,
        "transcripts": "none", "recordings": [recording],
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def clips(folder: Path) -> list[Tensor]:
    index = read_index(folder)
    return [read_tokens(folder, each, 0, each.frames, text=False)[0][0] for each in index.recordings]


def test_clips_are_followed_by_themselves(source, tmp_path):
    presented_twice(source, tmp_path / "twice", frames=20, step=10)
    starts = (0, 10, 20, 30)
    assert [clip.tolist() for clip in clips(tmp_path / "twice")] == [[*range(s, s + 20)] * 2 for s in starts]


def test_shuffled_clips_are_as_many_and_the_seed_decides_them(source, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        shuffled_twice(source, tmp_path / name, frames=20, step=10, seed=seed)
    first, again, other = (torch.stack(clips(tmp_path / name)) for name in ("first", "again", "other"))
    assert first.shape == (4, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[:, :20], first[:, 20:])
    assert all(len(set(clip[:20].tolist())) == 20 for clip in first), "no frame is drawn twice"
    assert first.max() > 30, "they are drawn from the whole recording"


@pytest.mark.parametrize("make", [presented_twice, shuffled_twice])
def test_recordings_that_are_all_too_short_raise(source, tmp_path, make):
    options = {"seed": 0} if make is shuffled_twice else {}
    with pytest.raises(DataError, match="no clip can be made of any recording; the longest has 50 frames"):
        make(source, tmp_path / "new", frames=51, step=10, **options)
