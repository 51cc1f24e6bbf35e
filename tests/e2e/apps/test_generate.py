"""``moshi-ttt generate`` as a user runs it."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from moshi_ttt.apps.generate import job as job_module
from moshi_ttt.apps.generate.writing import AnswerFormat
from moshi_ttt.apps.talker import SHIPPED_MEMORY, load_talker
from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.text import read_words
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings
from moshi_ttt.hosts.moshi.tiny import memory_adapter, speech_files
from tests.unit.data.conftest import FRAME, RATE, write_audio

FRAMES = 20
MEMORY, BASE = ("--adapter", SHIPPED_MEMORY), ("--adapter", "none")


def speech(number: int, frames: float = FRAMES) -> np.ndarray:
    """``[samples]``: the beginning of a recording that ships with the tiny Moshi."""
    return read_audio(speech_files()[number], RATE).numpy()[: round(frames * FRAME)]


@pytest.fixture
def talks(tmp_path) -> list[Path]:
    """Two recordings of other lengths, the second one's last frame not full."""
    return [
        write_audio(tmp_path / "one.wav", speech(0)[None]),
        write_audio(tmp_path / "two.wav", speech(1, FRAMES - 4.5)[None]),
    ]


def read_wav(path: Path) -> np.ndarray:
    """``[channels, samples]`` int16."""
    with wave.open(str(path)) as handle:
        assert handle.getframerate() == RATE
        values = np.frombuffer(handle.readframes(handle.getnframes()), dtype="<i2")
        return values.reshape(-1, handle.getnchannels()).T


def by_hand(samples: np.ndarray, *, slots: int, seed: int = 0, **settings) -> tuple[np.ndarray, RowState]:
    """Moshi's voice ``[samples]`` int16 and the memory, tick by tick in the last row of new slots."""
    files = resolve_repo("builtin:tiny")
    model, mimi = files.load_lm(dtype=torch.float32), files.load_mimi()
    load_adapter(model, memory_adapter())
    row, said = slots - 1, []
    with Slots(model, mimi, slots, largest_text_top_k=max(25, settings.get("text_top_k", 0))) as made:
        made.join(row, SlotSettings(seed=seed, **settings))
        for frame in torch.from_numpy(np.pad(samples, (0, -len(samples) % FRAME))).split(FRAME):
            said.append(made.tick({row: frame})[row].pcm)
        memory = made.save_row(row, "memory")
    return (torch.cat(said).clamp(-1, 1) * 32767).round().to(torch.int16).numpy(), memory


def test_answers_are_those_of_the_slots_tick_by_tick(cli, talks, tmp_path):
    result = cli("generate", *talks, "-o", "out", *MEMORY, "--stereo", "--memory-out", "memories", "--seed", 3)
    assert result.exit_code == 0, result.said
    assert "2 answer(s) in out." in result.said
    for path in talks:
        user, moshi = read_wav(tmp_path / "out" / path.name)
        played = read_audio(path, RATE).numpy()
        said, memory = by_hand(played, slots=2, seed=3)
        assert np.array_equal(moshi, said)
        assert np.allclose(user[: len(played)], played * 32767, atol=1)
        assert not user[len(played) :].any()
        kept = RowState.load(tmp_path / "memories" / f"{path.stem}.safetensors")
        assert kept.tensors.keys() == memory.tensors.keys()
        assert all(torch.equal(tensor, memory.tensors[name]) for name, tensor in kept.tensors.items())
        found = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        assert (found["input"], found["seed"], found["frames"]) == (str(path), 3, len(said) // FRAME)
        assert (found["seconds"], found["channels"]) == (len(said) / RATE, ["user", "moshi"])
        words = read_words(tmp_path / "out" / f"{path.stem}.json")
        assert " ".join(word.text for word in words) == found["text"]
        assert all(0 <= word.start < word.end <= found["seconds"] for word in words)


def test_an_answer_begins_with_the_memory_that_it_is_given(cli, talks, tmp_path):
    common = ("--slots", 1, *MEMORY, "--temp", 0, "--temp-text", 0)
    assert cli("generate", talks[0], "-o", "day1", *common, "--memory-out", "me.safetensors").exit_code == 0
    after = RowState.load(tmp_path / "me.safetensors")
    memories = ("--memory-in", "me.safetensors", "--memory-out", "day2/me.safetensors")
    result = cli("generate", talks[1], "-o", "day2", *common, *memories)
    assert result.exit_code == 0, result.said
    again = RowState.load(tmp_path / "day2" / "me.safetensors")
    heard = FRAMES - 4 + 1  # one more: a row's first step, which hears nothing
    assert again.counts.tokens == after.counts.tokens + heard
    assert "memory at the start: saved after" in (tmp_path / "day2" / "report.md").read_text()
    fresh = cli("generate", talks[1], "-o", "fresh", *common, "--memory-out", "fresh.safetensors")
    assert fresh.exit_code == 0
    other = RowState.load(tmp_path / "fresh.safetensors")
    assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in again.tensors.items())


@pytest.mark.exhaustive  # one seed's answer is compared above
def test_every_seed_has_an_answer_and_options_reach_the_row(cli, talks, tmp_path):
    options = (
        "--seed",
        1,
        "--seed",
        2,
        "--top-k",
        5,
        "--top-k-text",
        90,
        "--temp",
        1.5,
        "--no-updates",
        "--volume",
        0.5,
    )
    result = cli("generate", talks[0], "-o", "out", *options)  # with the shipped memory: the default
    assert result.exit_code == 0, result.said
    settings = {"top_k": 5, "text_top_k": 90, "temperature": 1.5, "updates": False, "volume": 0.5}
    for seed in (1, 2):
        (moshi,) = read_wav(tmp_path / "out" / f"one-seed{seed}.wav")
        assert np.array_equal(moshi, by_hand(speech(0), slots=2, seed=seed, **settings)[0])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name: found[name] for name in settings} == settings
    assert [each["seed"] for each in found["answers"].values()] == [1, 2]


def test_figures_of_the_memory_on_request(cli, talks, tmp_path):
    result = cli("generate", talks[0], "-o", "out", *MEMORY, "--inner-loss")
    assert result.exit_code == 0, result.said
    series = json.loads((tmp_path / "out" / "one.json").read_text())["memory_over_time"]
    assert series["seconds"] == [0.96, FRAMES / 12.5]
    assert list(series["blocks"]) == [f"layers.{layer}.sequence" for layer in (1, 2, 3)]
    for block in series["blocks"].values():
        assert block["moved"][0] > 0
        assert block["moved"][1] >= block["moved"][0]
        assert block["updates"][1] == (FRAMES + 1) // 16
        assert block["inner_loss"][1] != block["start_loss"][1]
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("layers.2.sequence (ttt_ridge)") == 1
    assert (tmp_path / "out" / "one.memory.png").stat().st_size > 1000
    assert cli("generate", talks[0], "-o", "base", "--inner-loss", *BASE).exit_code == 0
    assert "memory_over_time" not in json.loads((tmp_path / "base" / "one.json").read_text())


def test_a_recording_that_cannot_be_read_leaves_the_others(cli, talks, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    result = cli("generate", "text.wav", talks[0], "gone.wav", "-o", "out")
    assert result.exit_code == 1
    assert "2 recording(s) have no answer: text, gone. report.md says why." in result.said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".made_by.json", "metrics.json", "one.json", "one.wav", "report.md",
    ]  # fmt: skip
    assert "gone.wav does not exist" in (tmp_path / "out" / "report.md").read_text()
    alone = cli("generate", "gone.wav", "-o", "none")
    assert alone.exit_code == 2
    assert "gone.wav does not exist" in alone.said
    assert not (tmp_path / "none").exists()


def test_an_answer_that_cannot_be_written_leaves_nothing_of_itself(cli, talks, tmp_path, monkeypatch):
    write = AnswerFormat.write

    def full(self, folder, name, *arguments, **own):
        values = write(self, folder, name, *arguments, **own)
        if name == "one":
            raise OSError(28, "No space left on device")
        return values

    monkeypatch.setattr(AnswerFormat, "write", full)
    result = cli("generate", *talks, "-o", "out")
    assert result.exit_code == 1
    assert "No space left on device" in result.said
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.wav")) == ["two"]
    assert not (tmp_path / "out" / "one.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_complete_when_the_command_ends_is_kept(cli, talks, tmp_path, monkeypatch, error):
    class Ending(Slots):
        def tick(self, frames):
            if set(frames) == {0}:  # the shorter recording, in row 1, is complete
                raise error("ended")
            return super().tick(frames)

    monkeypatch.setattr(job_module, "Slots", Ending)
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match="ended"):
            cli("generate", *talks, "-o", "out")
    else:
        assert cli("generate", *talks, "-o", "out").exit_code == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"two.wav", "two.json", "report.md"}
    assert not (tmp_path / "out" / "one.wav").exists()
    assert "ended before its answer was complete" in (tmp_path / "out" / "report.md").read_text()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.exhaustive  # a folder is kept alike in test_quickstart.py
def test_nothing_is_replaced_that_the_command_did_not_make(cli, talks, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "me.safetensors").write_text("mine")
    for arguments, message in (
        (("-o", "mine"), "exists and is not empty"),
        (("-o", "mine", "--overwrite"), "was not made by `moshi-ttt generate`"),
        (("-o", "out", "--memory-out", "me.safetensors"), "me.safetensors exists"),
        (("-o", "out", "--memory-out", "mine"), "mine is a folder, and one memory is a file"),
    ):
        result = cli("generate", talks[0], *arguments)
        assert (result.exit_code, message in result.said) == (2, True), result.said
    both = cli("generate", *talks, "-o", "out", "--memory-out", "me.safetensors", "--overwrite")
    assert "me.safetensors is a file, and 2 memories need a folder" in both.said
    assert (tmp_path / "me.safetensors").read_text() == "mine"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert cli("generate", talks[1], "-o", "out").exit_code == 0
    assert cli("generate", talks[1], "-o", "out", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user-channel", "both"], "allowed are mean, left, right"),
        (["--seed", 1, "--seed", 1], "--seed is given twice: 1"),
        (["--memory-in", "one.wav"], "one.wav"),
        (["--adapter", "nowhere"], "nowhere"),
        (["--config", "nothing"], "No config 'nothing'"),
        (["--volume", 11], "volume is 11"),
        (["--temp", -1], "'--temp'"),
        (["--slots", 0], "'--slots'"),
    ],
)
def test_mistakes_are_messages_and_write_nothing(cli, talks, tmp_path, arguments, message):
    result = cli("generate", talks[0], "-o", "out", *arguments)
    assert result.exit_code == 2
    assert message in result.said
    assert not (tmp_path / "out").exists()


def test_a_memory_of_another_adapter_is_refused(cli, talks, tmp_path):
    assert cli("generate", talks[1], "-o", "base", "--memory-out", "base.safetensors", *BASE).exit_code == 0
    result = cli("generate", talks[0], "-o", "out", *MEMORY, "--memory-in", "base.safetensors")
    assert result.exit_code == 2
    assert "This memory cannot be continued here" in result.said
    assert not (tmp_path / "out").exists()


def test_a_whole_session_is_no_memory(cli, talks, tmp_path):
    talker = load_talker("quickstart", None)
    with Slots(talker.model, talker.mimi, 1) as slots:
        slots.join(0, SlotSettings())
        slots.save_row(0, "session").save(tmp_path / "all.safetensors")
    result = cli("generate", talks[0], "-o", "out", "--memory-in", "all.safetensors")
    assert (result.exit_code, "--memory-in takes a memory" in result.said) == (2, True)
