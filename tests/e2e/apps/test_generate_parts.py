"""The parts of ``moshi-ttt generate`` that need no model: names, reading, and what is shown."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from moshi_ttt.apps.generate.inputs import read_user, takes_of
from moshi_ttt.apps.generate.screen import LINE_LENGTH, PAUSE_FRAMES, Screen
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.data.audio_files import AudioError
from moshi_ttt.data.problems import DataError
from tests.unit.data.conftest import write_audio


def names(paths: list[str], *seeds: int) -> list[str]:
    return [take.name for take in takes_of([Path(path) for path in paths], seeds or [0])]


def test_every_answer_has_a_name_of_its_own():
    assert names(["a.wav", "b/a.flac", "A.ogg", "c.wav"]) == ["a", "a-2", "A-3", "c"]
    assert names(["a.wav"], 3, 1) == ["a-seed3", "a-seed1"]
    assert names(["a-2.wav", "a.wav", "b/a.wav"]) == ["a-2", "a", "a-3"]
    assert names(["metrics.wav", "Report.mp3"]) == ["metrics-2", "Report-2"]
    assert [(take.path.name, take.seed) for take in takes_of([Path("a.wav"), Path("b.wav")], [0, 1])] == [
        ("a.wav", 0), ("a.wav", 1), ("b.wav", 0), ("b.wav", 1),
    ]  # fmt: skip


def test_a_folder_stands_for_its_recordings(tmp_path):
    for name in ("b.wav", "sub/a.FLAC", "._b.wav", "notes.txt"):
        path = tmp_path / "talks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert names([str(tmp_path / "talks"), "x.wav"]) == ["b", "a", "x"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no recordings"):
        names([str(tmp_path / "empty")])


def test_a_seed_given_twice_is_refused():
    with pytest.raises(ConfigError, match="twice: 1"):
        names(["a.wav"], 1, 2, 1)


def test_one_side_of_a_stereo_recording(tmp_path):
    sides = np.stack([np.full(4800, 0.5), np.full(4800, -0.25)]).astype(np.float32)
    stereo = write_audio(tmp_path / "s.wav", sides)
    for channel, value in (("left", 0.5), ("right", -0.25), ("mean", 0.125)):
        samples = read_user(stereo, 24_000, channel)
        assert (samples.shape, samples.dtype) == ((4800,), torch.float32)
        assert samples.mean().item() == pytest.approx(value, abs=1e-4)
    assert read_user(stereo, 12_000, "left").shape == (2400,)
    mono = write_audio(tmp_path / "m.wav", sides[:1])
    with pytest.raises(AudioError, match=r"1 channel\(s\), so no right one"):
        read_user(mono, 24_000, "right")


def shown(*said: tuple[str, str]) -> list[str]:
    """The lines after frames of (recording, piece)."""
    console = Console(file=io.StringIO(), width=60)
    with Screen(console, total=1, frame_rate=12.5) as screen:
        for name, piece in said:
            screen.heard(name, piece)
    return console.file.getvalue().splitlines()


def test_a_line_ends_at_a_pause_and_at_the_end_and_says_when_it_began():
    quiet = [("a", "")] * PAUSE_FRAMES
    assert shown(("a", ""), ("a", " hel"), ("a", "lo"), *quiet, ("a", " you")) == ["a 0:00.1  hello", "a 0:01.0  you"]
    assert shown(("a", " one"), ("b", " two"), ("a", " [x]"), ("b", "")) == ["a 0:00.0  one [x]", "b 0:00.0  two"]
    long = shown(*[("a", " word")] * 40)
    assert len(long) > 1
    assert all(len(line) < LINE_LENGTH + 15 for line in long)
    assert sum(line.count("word") for line in long) == 40


def test_what_has_ended_is_said_after_its_last_line():
    console = Console(file=io.StringIO(), width=60)
    with Screen(console, total=1, frame_rate=12.5) as screen:
        screen.heard("a", " hi")
        screen.ended("a", "2.0 s answered")
        screen.ended("b", "no answer. [gone]")
    assert console.file.getvalue().splitlines() == ["a 0:00.0  hi", "a: 2.0 s answered", "b: no answer. [gone]"]
