"""``moshi-ttt evaluate`` as a user runs it."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moshi_ttt import default_registry, inject, parse_config, save_adapter
from moshi_ttt.configs.reading import read_speakers
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.evaluation.documents import read_documents
from moshi_ttt.hosts.moshi.loading import load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.tiny import memory_adapter, speech_files
from tests.small_moshi import small_moshi
from tests.unit.data.conftest import write_audio, write_manifest, write_transcript


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    host = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}
    config = parse_config(
        {"host": host, "ttt": [{"variant": "ttt_linear", "layers": "1", "chunk": 8}]}, registry=default_registry()
    )
    model = resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)
    return save_adapter(inject(model, config), tmp_path_factory.mktemp("checkpoint") / "adapter")


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[Path, Path]:
    """A run's config and its adapter, of a small Moshi whose attention sees 16 frames."""
    folder, repo = tmp_path_factory.mktemp("short"), small_moshi(context=16)
    entry = {"variant": "ttt_linear", "layers": "1", "chunk": 8}
    host = {"name": "moshi", "hf_repo": repo, "dtype": "float32"}
    model = resolve_repo(repo).load_lm(dtype=torch.float32)
    config = parse_config({"host": host, "ttt": [entry]}, registry=default_registry())
    run = {
        "run_dir": "out", "moshi_paths": {"hf_repo_id": repo}, "param_dtype": "float32", "ttt": [entry],
        "data": {"train_data": "x"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml", save_adapter(inject(model, config), folder / "checkpoint" / "adapter")


def write_talks(folder: Path, first: int) -> Path:
    """SPEAKER/BOOK/CHAPTER, two books of two chapters of 5 s of real speech, from the ``first`` recording on."""
    for number in range(4):
        book, chapter = divmod(number, 2)
        place = folder / "1" / f"book{first + book}"
        place.mkdir(parents=True, exist_ok=True)
        with wave.open(str(speech_files()[first + number])) as handle:
            rate, samples = handle.getframerate(), handle.readframes(5 * handle.getframerate())
        with wave.open(str(place / f"{chapter}.wav"), "wb") as handle:
            handle.setnchannels(1)
            handle.setsampwidth(2)
            handle.setframerate(rate)
            handle.writeframes(samples)
    return folder


@pytest.fixture
def talks(tmp_path) -> Path:
    return write_talks(tmp_path / "talks", 0)


@pytest.mark.exhaustive  # layouts: tests/unit/data; long context by command: test_long_context_in_segments
def test_long_context_of_a_folder_in_either_layout(cli, talks, adapter, tmp_path):
    command = ["evaluate", "long-context", "train-cpu", "--data", talks, "-a", f"mine={adapter.parent}", "--window", 16]
    result = cli(*command, "--out", tmp_path / "books", "--layout", "librilight", "--batch-size", 2)
    assert result.exit_code == 0, result.said
    metrics = json.loads((tmp_path / "books" / "metrics.json").read_text())
    assert metrics["recordings"] == ["1/book0", "1/book1"]
    assert metrics["subjects"]["mine"]["parameters"] > 0
    assert "mine, memory of another" in result.said
    compared = cli("evaluate", "compare", tmp_path / "books", "--out", tmp_path / "compared")
    assert "audio loss beyond the attention context" in compared.said
    assert not list(tmp_path.glob(".books*"))
    again = cli(*command, "--out", tmp_path / "books", "--layout", "librilight")
    assert again.exit_code == 2
    assert "--overwrite" in again.said
    short = cli(*command, "--out", tmp_path / "files")
    assert short.exit_code == 2
    assert "No recording reaches beyond the attention's context" in short.said
    assert not (tmp_path / "files").exists()


def test_long_context_in_segments(cli, talks, adapter, tmp_path):
    command = [
        "evaluate", "long-context", "train-cpu", "--data", talks, "--layout", "librilight", "-a", f"mine={adapter}",
        "--window", 16, "--segments", 25,
    ]  # fmt: skip
    result = cli(*command, "--out", tmp_path / "segments")
    assert result.exit_code == 0, result.said
    assert "Attention is not: it restarts at each segment" in result.said
    metrics = json.loads((tmp_path / "segments" / "metrics.json").read_text())
    assert (metrics["segment_frames"], metrics["every_frames"]) == (25, 75)  # the context of 64, in whole segments
    uneven = cli(*command, "--every", 64, "--out", tmp_path / "uneven")
    assert uneven.exit_code == 2
    assert "every 64 frames would act inside a segment of 25" in uneven.said
    assert "50 or 75" in uneven.said
    assert not (tmp_path / "uneven").exists()


def test_recall(cli, talks, short, tmp_path):
    config, adapter = short
    result = cli(
        "evaluate", "recall", config, "--data", talks, "--layout", "librilight", "--frames", 18,
        "--clips", 2, "-a", f"mine={adapter}", "--out", tmp_path / "recall",
    )  # fmt: skip
    assert result.exit_code == 0, result.said
    assert "| mine, updates on | third |" in result.said
    assert json.loads((tmp_path / "recall" / "metrics.json").read_text())["pieces_by_recording"] == [2, 2]
    compared = cli("evaluate", "compare", tmp_path / "recall", "--out", tmp_path / "compared")
    assert "recall, third presentation" in compared.said


def test_earlier_names_of_options_work_with_a_warning(cli, talks, short, tmp_path):
    given = ("recall", short[0], "--data", talks, "--layout", "librilight", "--frames", 18, "--out", tmp_path / "r")
    result = cli("evaluate", *given, "--pieces", 2)
    assert result.exit_code == 0, result.said
    assert "Warning: --pieces is now --clips" in result.said
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["pieces_asked_for"] == 2
    both = cli("evaluate", *given, "--pieces", 2, "--clips", 2)
    assert (both.exit_code, "Give --clips alone" in both.said) == (2, True)
    scored = ("zero-shot", "train-cpu", "--dataset", "csv", "--source", tmp_path / "none.csv", "--out", tmp_path / "z")
    refused = cli("evaluate", *scored, "--normalisation", "mean")
    assert refused.exit_code == 2
    assert "Warning: --normalisation is now --normalization" in refused.said
    assert "--normalization 'mean': allowed are token, sum" in refused.said
    for name in ("recall", "zero-shot"):
        shown = cli("evaluate", name, "--help").said
        assert not {"--pieces", "--normalisation"} & set(shown.split())


@pytest.mark.exhaustive  # test_volumes.py, without the command line
def test_recall_by_volume(cli, talks, short, tmp_path):
    config, adapter = short
    command = [
        "evaluate", "recall", config, "--data", talks, "--layout", "librilight", "--frames", 18, "--out",
        tmp_path / "recall",
    ]  # fmt: skip
    for given, message in ((["0,0.5,0.5"], "are one volume"), ([""], "'' is no volume"), (["0,loud"], "'loud' is no")):
        refused = cli(*command, "-a", f"mine={adapter}", "--volume", *given)
        assert refused.exit_code == 2
        assert message in refused.said
    refused = cli(*command, "--volume", "0,1")
    assert refused.exit_code == 2
    assert "There is no volume without blocks" in refused.said
    assert not (tmp_path / "recall").exists()
    result = cli(*command, "-a", f"mine={adapter}", "--volume", "0,1")
    assert result.exit_code == 0, result.said
    assert "At volume 0, the losses of mine are the base model's, bit for bit." in result.said
    points = json.loads((tmp_path / "recall" / "metrics.json").read_text())["by_volume"]
    assert [point["volume"] for point in points] == [0, 1]
    compared = cli("evaluate", "compare", tmp_path / "recall", "--out", tmp_path / "compared")
    assert "cost of the first presentation" in compared.said
    assert "| mine, volume 1 |" in compared.said


@pytest.mark.exhaustive  # test_between.py, without the command line
def test_recall_after_other_clips(cli, talks, tmp_path):
    others, out = write_talks(tmp_path / "others", 4), tmp_path / "far"
    command = [
        "evaluate", "recall", "train-cpu", "--data", talks, "--layout", "librilight", "--frames", 96, "--out", out,
    ]  # fmt: skip
    mine, between = ["-a", f"mine={memory_adapter()}"], ["--between", "1,2"]
    for given, message in (
        ([*mine, *between], "give --interludes"),
        ([*mine, "--interludes", others], "--interludes without --between"),
        ([*between, "--interludes", others], "compares adapters with the base model"),
        ([*mine, "--between", "0,1", "--interludes", others], "'0' is no number of clips"),
        ([*mine, *between, "--interludes", tmp_path / "nowhere"], "nowhere"),
        ([*mine, *between, "--interludes", talks], "2 of the interludes are recordings under test"),
        ([*mine, "--between", "3", "--interludes", others], "--interludes has 2"),
    ):
        refused = cli(*command, *given)
        assert refused.exit_code == 2
        assert message in refused.said
        assert not out.exists()
    result = cli(*command, *mine, *between, "--interludes", others, "--volume", "0.5,1")
    assert result.exit_code == 0, result.said
    assert "interludes from" in result.said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["recordings"] == ["1/book0", "1/book1"]
    points = [(each["volume"], each["clips_between"]) for each in metrics["between"]]
    assert points == [(0.5, 1), (0.5, 2), (1, 1), (1, 2)]
    assert metrics["between"][2]["gain_beyond_base"]["low"] > 0.1  # a memory that was trained to recall
    compared = cli("evaluate", "compare", out, "--out", tmp_path / "compared")
    assert "recall after 2 other clips, beyond the base" in compared.said
    assert "| mine, volume 0.5 |" in compared.said


@pytest.mark.first_by_default
@pytest.mark.parametrize("names", [["mine", "other"], ["mine"]])
def test_inner_loop(cli, talks, adapter, tmp_path, names):
    chosen = [part for name in names for part in ("-a", f"{name}={adapter}")]
    result = cli("evaluate", "inner-loop", "train-cpu", "--data", talks, *chosen, "--out", tmp_path / "inner")
    assert result.exit_code == 0, result.said
    assert "layers.1.sequence" in result.said
    folders = [tmp_path / "inner"] if len(names) == 1 else [tmp_path / "inner" / name for name in names]
    for folder in folders:
        assert list(folder.glob("*.png"))
        assert json.loads((folder / "metrics.json").read_text())["made_by"] == "moshi-ttt evaluate inner-loop"
    again = ["evaluate", "inner-loop", "train-cpu", "--data", talks, *chosen, "--out", tmp_path / "inner"]
    assert cli(*again, "--overwrite").exit_code == 0
    alone = cli("evaluate", "inner-loop", "train-cpu", "--data", talks, "--out", tmp_path / "none")
    assert alone.exit_code == 2
    assert "The base model has no inner loop" in alone.said


def test_zero_shot_of_pairs_of_ones_own(cli, talks, adapter, tmp_path):
    files = sorted(talks.rglob("*.wav"))
    for path in files:
        samples = np.frombuffer(path.read_bytes()[44:], dtype="<i2")[:16_000]
        with wave.open(str(path), "wb") as handle:
            handle.setnchannels(1)
            handle.setsampwidth(2)
            handle.setframerate(24_000)
            handle.writeframes(samples.tobytes())
    (tmp_path / "pairs.csv").write_text(f"right,wrong\n{files[0]},{files[1]}\n{files[2]},{files[3]}\n")
    result = cli(
        "evaluate", "zero-shot", "train-cpu", "--dataset", "csv", "--source", tmp_path / "pairs.csv",
        "-a", f"mine={adapter}", "--out", tmp_path / "zero",
    )  # fmt: skip
    assert result.exit_code == 0, result.said
    assert "mine, updates off" in result.said
    assert json.loads((tmp_path / "zero" / "metrics.json").read_text())["made_by"] == "moshi-ttt evaluate zero-shot"
    compared = cli("evaluate", "compare", tmp_path / "zero", "--out", tmp_path / "compared")
    assert "| mine, updates off |" in compared.said
    assert "csv (share of pairs right)" in compared.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recall", "train-cpu", "--data", "nowhere"], "nowhere"),
        (["recall", "train-cpu", "--data", "empty"], "holds no recordings"),
        (["recall", "train-cpu", "--data", "empty", "--layout", "books"], "allowed are files and librilight"),
        (["recall", "train-cpu", "--data", "empty", "-a", "folder"], "write NAME=FOLDER"),
        (["recall", "train-cpu", "--data", "empty", "-a", "x=empty"], "is no adapter"),
        (["recall", "nothing", "--data", "empty"], "No config 'nothing'"),
        (["recall", "train-cpu", "--data", "empty", "--clips", "0"], "'--clips'"),
        (["zero-shot", "train-cpu", "--dataset", "swuggy", "--source", "empty"], "empty"),
        (["zero-shot", "train-cpu", "--dataset", "csv", "--source", "x", "--codebooks", "first"], "all, semantic"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_mistakes_are_messages(cli, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    result = cli("evaluate", *arguments, "--out", "out")
    assert result.exit_code == 2
    assert message in result.said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def dialogue(tmp_path) -> Path:
    """A manifest of a stereo recording: speech on the right, said by ``SPEAKER_00``; silence on the left."""
    samples = read_audio(speech_files()[0], 24_000).numpy()[: 40 * 1920]
    write_audio(tmp_path / "a.wav", np.stack([0 * samples, samples]))
    write_transcript(tmp_path / "a.json", [("hello", 0.5, 0.9), ("there", 1.0, 1.4)], speaker="SPEAKER_00")
    return write_manifest(tmp_path / "t.jsonl", [{"path": "a.wav", "duration": 3.2}])


def test_documents_know_who_moshi_is(dialogue):
    bundle = resolve_repo("builtin:tiny")
    codec = SpeechCodec.of(load_skeleton("builtin:tiny"), bundle.load_mimi(), bundle.tokenizer())
    other = replace(codec, speaker_label="SPEAKER_00", moshi_channel="right")
    said: list[str] = []

    def read(codec):
        (document,) = read_documents(
            str(dialogue), codec, layout="files", transcripts="optional", limit=None, report=said.append
        )
        return document.codes

    first, second = read(codec), read(other)
    assert torch.equal(first[1:9], second[9:])
    assert torch.equal(first[9:], second[1:9])
    assert set(bundle.tokenizer().encode("hello")) <= set(second[0].tolist())
    assert len(set(first[0].tolist())) == 1
    assert [line.startswith("Warning") for line in said] == [False, True, False]
    assert "'SPEAKER_00' (2)" in said[1]


def test_who_moshi_is_comes_from_the_command_line_or_the_runs_config(cli, tmp_path, dialogue):
    run = {"run_dir": "out", "lora": {"enable": True}, "moshi_paths": {"hf_repo_id": "builtin:tiny"}}
    data = {"train_data": "x", "speaker_label": "A", "moshi_channel": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "data": data}))
    config = str(tmp_path / "run.yaml")
    assert read_speakers(config) == ("A", "right")
    assert read_speakers(config, "B") == ("B", "right")
    assert read_speakers(config, None, "0") == ("A", "left")
    assert read_speakers("quickstart") == ("SPEAKER_MAIN", "left")
    result = cli("evaluate", "recall", config, "--data", dialogue, "--out", "o", "--moshi-channel", "middle")
    assert result.exit_code == 2
    assert "moshi_channel = 'middle'" in result.said
    result = cli("evaluate", "recall", config, "--data", dialogue, "--out", "o", "--frames", 8, "--batch-size", 1)
    assert "0 words kept, 2 dropped" in result.said
    assert "Warning" in result.said
