"""``moshi-ttt train`` and ``moshi-ttt encode`` as a user runs them."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import yaml

from tests.small_moshi import small_moshi
from tests.unit.data.conftest import FRAME, RATE, words_every, write_audio, write_manifest, write_transcript

from .conftest import FRAMES, records, values


@pytest.fixture
def config(encoded, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(encoded, tmp_path / "run")))
    return path


def test_train_says_what_it_trains_and_where_it_saved(cli, config, tmp_path):
    result = cli("train", config, "max_steps=2", "ttt.0.layers=1")
    assert result.exit_code == 0, result.said
    for part in (
        f"{small_moshi()}; blocks: layers.1.sequence (ttt_linear); 1 rank(s) on cpu", "│ ttt", "│ gates", "│ frozen",
        "3 recordings", "11 segments", "step 2/2: text", "Done: 2 steps; checkpoint:", "checkpoint_000002",
    ):  # fmt: skip
        assert part in result.said
    assert len(records(tmp_path / "run")) == 2
    again = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (again["max_steps"], again["ttt"][0]["layers"]) == (2, 1)


def test_args_yaml_makes_the_same_run(cli, config, tmp_path):
    assert cli("train", config, "max_steps=2").exit_code == 0
    result = cli("train", tmp_path / "run" / "args.yaml", f"run_dir={tmp_path / 'again'}")
    assert result.exit_code == 0, result.said
    first, second = ([r["loss"] for r in records(tmp_path / name)] for name in ("run", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["max_stepz=2"], "unknown key 'max_stepz'. Did you mean 'max_steps'"),
        (["max_steps"], "write key=value"),
        (["data.train_data=nowhere.jsonl"], "nowhere.jsonl"),
        (["ttt.0.layers=9"], "layers are 0 to 3"),
        (["moshi_paths.hf_repo_id=builtin:moshi-7b"], "without weights"),
        (["device=cuda"], "CUDA"),
        (["shard_size=2"], "1 ranks are no multiple"),
        (["tensorboard=true"], "pip install tensorboard"),
        (["wandb.project=x"], "pip install wandb"),
        (["precision=uniform", "ttt.0.base_lr=-1"], "base_lr"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_messages(cli, config, monkeypatch, arguments, message):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if they were not installed
    result = cli("train", config, *arguments)
    assert result.exit_code == 2
    assert message in result.said


@pytest.mark.exhaustive  # what is in shards is tested in tests/unit/data/test_shards.py
def test_encode_then_train_on_the_shards_gives_the_same_run(cli, encoded, config, tmp_path):
    manifest = encoded.parent / "train.jsonl"
    made = cli("encode", config, f"data.train_data={manifest}", "--out", tmp_path / "shards")
    assert made.exit_code == 0, made.said
    assert f"Train with data.train_data={tmp_path / 'shards'}" in made.said
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["frames"] == FRAMES
    for name, data in (("whole", manifest), ("shards", tmp_path / "shards")):
        result = cli("train", config, f"data.train_data={data}", f"run_dir={tmp_path / 'runs' / name}", "max_steps=2")
        assert result.exit_code == 0, result.said
    first, second = ([r["loss"] for r in records(tmp_path / "runs" / name)] for name in ("whole", "shards"))
    assert first == second


def test_encode_refuses_what_it_cannot_do(cli, encoded, config, tmp_path):
    assert "no data.eval_data" in cli("encode", config, "--eval", "--out", tmp_path / "x").said
    assert "encoded already" in cli("encode", config, "--out", tmp_path / "x").said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    manifest = encoded.parent / "train.jsonl"
    result = cli("encode", config, f"data.train_data={manifest}", "--out", tmp_path / "full")
    assert result.exit_code == 2
    assert "not empty" in result.said
    assert not (tmp_path / "x").exists()


def test_a_missing_recording_is_named_with_its_line(cli, encoded, config, tmp_path):
    folder = tmp_path / "speech"
    shutil.copytree(encoded.parent, folder)
    (folder / "talk1.wav").unlink()
    result = cli("train", config, f"data.train_data={folder / 'train.jsonl'}")
    assert result.exit_code == 2
    assert "train.jsonl:2" in result.said
    assert "data.max_bad_share" in result.said
    allowed = cli("train", config, f"data.train_data={folder / 'train.jsonl'}", "data.max_bad_share=0.5", "max_steps=1")
    assert allowed.exit_code == 0, allowed.said
    assert "Warning: left out:" in allowed.said


@pytest.fixture
def dialogue(tmp_path):
    """A manifest of a silent stereo recording whose words are those of ``SPEAKER_00``, deep in a folder."""
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    write_audio(folder / "a.wav", np.zeros((2, 4 * FRAMES * FRAME)))
    write_transcript(folder / "a.json", words_every(0.5, 3.0), speaker="SPEAKER_00")
    write_manifest(folder / "train.jsonl", [{"path": "a.wav", "duration": 4 * FRAMES * FRAME / RATE}])
    return folder.parent


@pytest.mark.parametrize("command", ["train", "encode"])
def test_a_corpus_without_a_word_trains_nobody_to_be_silent(cli, config, dialogue, tmp_path, command):
    where = ["--out", tmp_path / "out"] if command == "encode" else []
    result = cli(command, config, f"data.train_data={dialogue}", *where)
    assert result.exit_code == 2
    assert "not one word of the transcripts is used, and Moshi would be trained to be silent" in result.said
    assert "6 of other speakers: 'SPEAKER_00' (6)" in result.said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_who_moshi_is_is_said_once_and_remembered(cli, config, dialogue, tmp_path):
    who = ["data.speaker_label=SPEAKER_00", "data.moshi_channel=1"]
    made = cli("encode", config, f"data.train_data={dialogue}", *who, "--out", tmp_path / "out")
    assert made.exit_code == 0, made.said
    assert "6 words kept, 0 dropped" in made.said
    shards = f"data.train_data={tmp_path / 'out'},"  # a comma may be left over
    refused = cli("train", config, shards, "data.speaker_label=SPEAKER_00")
    assert refused.exit_code == 2
    assert "data.moshi_channel 'right', and is read with 'left'" in refused.said
    trained = cli("train", config, shards, *who, "max_steps=1", "world_size=8", "eval_freq=-1")
    assert trained.exit_code == 0, trained.said
    assert "train: 6 words kept, 0 dropped" in trained.said
    other = cli("train", config, f"data.train_data={dialogue}", "max_steps=2", "resume=true", who[0])
    assert other.exit_code == 2
    assert "'moshi_channel': 'right'" in other.said
