"""Every command on every kind of Moshi: what it does, or why it does not, in the same words everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moshi_ttt.data.audio import read_audio
from moshi_ttt.evaluation.zero_shot import score_codes
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm, speech_files
from tests.unit.data.conftest import RATE, words_every, write_audio, write_manifest, write_transcript

from .repositories import VOICE, make_codec, make_repository, make_tokenizer

CONDITIONAL = "needs conditions (description), and training and evaluating with conditions are not supported"
TEXT_ALONE = "predicts text alone (it has no depformer)"
TTT = [{"variant": "ttt_linear", "layers": "1", "chunk": 8}]
EVALUATIONS = {
    "long-context": ["--window", 16],
    "recall": ["--frames", 40],
    "inner-loop": [],
    "zero-shot": ["--dataset", "csv", "--source", "pairs.csv"],
}


@pytest.fixture
def talks(tmp_path) -> Path:
    """A manifest of two recordings of 5 s, of one channel."""
    speech = read_audio(speech_files()[0], RATE).numpy()
    for number in range(2):
        write_audio(tmp_path / f"talk{number}.wav", speech[None, number * 10_000 :][:, : 5 * RATE])
        write_transcript(tmp_path / f"talk{number}.json", words_every(0.5, 5.0))
    (tmp_path / "pairs.csv").write_text(f"right,wrong\n{tmp_path / 'talk0.wav'},{tmp_path / 'talk1.wav'}\n")
    return write_manifest(tmp_path / "talks.jsonl", [{"path": f"talk{n}.wav", "duration": 5.0} for n in range(2)])


@pytest.fixture
def command(cli, tmp_path, talks):
    """Runs a command on a repository: config, data and output folder are filled in."""

    def run(name: str, repository: Path, *more: object):
        host = {"name": "moshi", "hf_repo": str(repository), "dtype": "float32"}
        (tmp_path / "plain.yaml").write_text(json.dumps({"host": host, "ttt": TTT}))
        training = {
            "data": {"train_data": str(talks)}, "moshi_paths": {"hf_repo_id": str(repository)}, "ttt": TTT,
            "run_dir": "run", "duration_sec": 2, "max_steps": 1, "param_dtype": "float32", "log_health": False,
            "gradient_checkpointing": False, "batch_size": 2,
        }  # fmt: skip
        (tmp_path / "train.yaml").write_text(json.dumps(training))
        if name in EVALUATIONS:
            data = [] if name == "zero-shot" else ["--data", talks]
            return cli("evaluate", name, "plain.yaml", *data, *EVALUATIONS[name], "--out", f"out-{name}", *more)
        if name == "generate":
            return cli("generate", tmp_path / "talk0.wav", "--config", "plain.yaml", "--out", "out-generate", *more)
        if name == "quickstart":
            (tmp_path / "quick.yaml").write_text(json.dumps({"host": host, "ttt": TTT, "train": {}, "stream": {}}))
            return cli("quickstart", "--config", "quick.yaml", "--out", "out-quick")
        arguments = {
            "train": ["train", "train.yaml"], "plan": ["train", "train.yaml", "--plan"],
            "encode": ["encode", "train.yaml", "--out", "out-encode"], "explain": ["explain", "plain.yaml"],
            "doctor": ["doctor", "plain.yaml", "--batches", 1],
        }  # fmt: skip
        return cli(*arguments[name], *more)

    return run


ALL = ["train", "plan", "encode", "doctor", "quickstart", "generate", *EVALUATIONS]


@pytest.mark.first_by_default
@pytest.mark.parametrize("kind", ["sum condition", "cross-attention"])
def test_conditional_models_are_explained_and_otherwise_refused_in_the_same_words(command, tmp_path, kind):
    repository = make_repository(tmp_path / "model", kind)
    assert command("explain", repository).exit_code == 0
    for name in ALL:
        result = command(name, repository)
        assert (result.exit_code, CONDITIONAL in result.said) == (2, True), (name, result.said)
    assert not list(tmp_path.glob("out*"))
    assert not (tmp_path / "run").exists()


def test_speech_to_text_has_a_text_loss_and_no_other(command, tmp_path):
    repository = make_repository(tmp_path / "model", "speech to text")
    for name in ("train", "plan", "encode", "recall", "zero-shot", "generate"):
        result = command(name, repository)
        assert (result.exit_code, TEXT_ALONE in result.said) == (2, True), (name, result.said)
    assert "predicts text alone" in command("quickstart", repository).said
    assert command("explain", repository).exit_code == 0
    doctor = command("doctor", repository, "--json")
    assert json.loads(doctor.stdout)["blocks"]["layers.1.sequence"]["figures"]["inner_loss_before"] > 0
    losses = {}
    for more in ((), ("--segments", 16)):
        result = command("long-context", repository, "--overwrite", *more)
        assert result.exit_code == 0, result.said
        curves = json.loads((tmp_path / "out-long-context" / "metrics.json").read_text())["curves"]
        assert [curve["stream"] for curve in curves] == ["text"]
        losses[more] = curves[0]["mean_by_window"]
    assert losses[()][0] == pytest.approx(losses["--segments", 16][0], abs=1e-4)  # the same start, the same numbers


def test_speech_to_text_without_transcripts_has_no_loss(command, cli, tmp_path):
    make = make_repository(tmp_path / "model", "speech to text")
    command("explain", make)
    (tmp_path / "bare").mkdir()
    (tmp_path / "talk0.wav").rename(tmp_path / "bare" / "talk0.wav")
    result = cli("evaluate", "long-context", "plain.yaml", "--data", "bare", "--window", 16, "--out", "out-bare")
    assert result.exit_code == 2
    assert "needs recordings with transcripts" in result.said
    assert not list(tmp_path.glob("out*"))


def test_a_moshi_that_predicts_both_voices_is_trained_and_evaluated(command, tmp_path):
    repository = make_repository(tmp_path / "model", "both voices")
    for name in ("plan", "train", "doctor", "long-context", "zero-shot"):
        result = command(name, repository)
        assert result.exit_code == 0, (name, result.said)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["kind"] == "train"
    refused = command("generate", repository)
    assert (refused.exit_code, "need a model that hears one voice and predicts the other" in refused.said) == (2, True)
    refused = command("quickstart", repository)
    assert refused.exit_code == 2
    assert "reads 2 voice(s) and predicts both voices" in refused.said


@pytest.mark.first_by_default
@pytest.mark.parametrize(("pieces", "why"), [(520, "some of its tokens have no embedding"), (300, "mean other words")])
def test_a_tokenizer_of_another_size_is_refused_before_anything_is_read(command, tmp_path, pieces, why):
    repository = make_repository(tmp_path / "model")
    make_tokenizer(repository / "spm.model", pieces)
    (repository / "model.safetensors").write_bytes(b"never read")
    for name in ("train", "encode", "quickstart", *EVALUATIONS):
        result = command(name, repository)
        assert (result.exit_code, why in result.said) == (2, True), (name, result.said)
        assert f"has {pieces} pieces" in result.said
    assert not list(tmp_path.glob("out*"))
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive  # a tokenizer of another size is refused alike above
@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"bins": 64}, "64 codes in a codebook, and the model 128"),
        ({"bins": 256}, "256 codes in a codebook, and the model 128"),
        ({"codebooks": 4}, "The codec has 4 codebooks, and a voice of the model 8"),
        ({"frame_rate": 25.0}, "25 frames a second, and Moshi takes 12.5"),
    ],
)
def test_a_codec_of_other_sizes_is_refused_before_anything_is_read(command, tmp_path, sizes, why):
    repository = make_repository(tmp_path / "model")
    make_codec(repository, **sizes)
    (repository / "model.safetensors").write_bytes(b"never read")
    for name in ("train", "encode", "quickstart", *EVALUATIONS):
        result = command(name, repository)
        assert (result.exit_code, why in result.said) == (2, True), (name, result.said)


@pytest.mark.first_by_default
def test_a_layout_that_is_not_known_is_refused(command, tmp_path):
    repository = make_repository(tmp_path / "model", n_q=24, dep_q=24, delays=[0, *VOICE, *VOICE, *VOICE])
    for name in ("train", "encode", "quickstart", "long-context"):
        result = command(name, repository)
        assert (result.exit_code, "Error: This model predicts 24 of the 24 codebooks" in result.said) == (2, True), name


def test_a_codec_with_more_codebooks_than_a_voice_is_cut_to_it(command, tmp_path):
    repository = make_repository(tmp_path / "model")
    make_codec(repository, codebooks=12)
    assert command("encode", repository).exit_code == 0


def test_zero_shot_scores_moshis_voice_alone():
    """The user's voice is silence in the recordings of pairs, whoever predicts it."""
    both = random_tiny_lm(n_q=16, dep_q=16, delays=[0, *VOICE, *VOICE])
    codes = torch.randint(0, both.card, (17, 10), generator=torch.Generator().manual_seed(0))
    codes[0] = both.zero_token_id
    assert score_codes(both, MOSHI_HOST, codes).tokens == 10 + 7 * 9  # seven codebooks are a frame late
