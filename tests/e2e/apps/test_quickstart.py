"""The quickstart from end to end on few steps, and every input it must refuse, with nothing half-written."""

from __future__ import annotations

import json
import math
import runpy
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moshi_ttt import default_registry, inject, load_adapter, parse_config
from moshi_ttt.apps.quickstart import run as running
from moshi_ttt.apps.quickstart import setup
from moshi_ttt.apps.quickstart.data import load_speech
from moshi_ttt.apps.quickstart.evaluate import Curve, compare, evaluate
from moshi_ttt.apps.quickstart.recall import shipped_memory
from moshi_ttt.apps.quickstart.results import verdict
from moshi_ttt.apps.quickstart.setup import Request, read_settings, run_config
from moshi_ttt.apps.quickstart.stream import loss_with_memory_cleared
from moshi_ttt.configs.paths import find_config
from moshi_ttt.data.audio import read_audio
from moshi_ttt.data.audio_files import AudioError
from moshi_ttt.hosts.moshi.host import MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.tiny import memory_adapter
from moshi_ttt.system.output_folder import OutputError, new_folder
from moshi_ttt.training.optimizer import rates
from tests.project import ROOT

from .conftest import write_wav

EXAMPLE = ROOT / "examples" / "quickstart_api.py"
FILES = {
    ".made_by.json", "adapter", "generated.wav", "heard_twice.png", "loss_by_position.png", "metrics.json", "report.md",
    "state.png", "training.png",
}  # fmt: skip


@pytest.fixture
def held_out_is_short(monkeypatch):
    """16 s of the recording that is held out, which is five times as long."""

    def cut(*arguments):
        speech = load_speech(*arguments)
        frames, whole = 200, speech.held_out
        seconds = whole.seconds * frames / whole.audio.shape[1]
        held_out = replace(whole, seconds=seconds, audio=whole.audio[:, :frames], text=whole.text[:frames])
        return replace(speech, held_out=held_out)

    monkeypatch.setattr(setup, "load_speech", cut)


@pytest.mark.usefixtures("held_out_is_short")
def test_quickstart_writes_the_whole_folder(cli, tmp_path):
    # 8 s of a stream reach beyond the attention's context, as the 30 s of the default do.
    config = tmp_path / "short.yaml"
    config.write_text(find_config("tiny-ttt-linear").read_text() + "stream: {seconds: 8}\n")
    result = cli("quickstart", "--steps", 2, "--out", "run", "--config", config)
    assert result.exit_code == 0, result.said
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"run", "short.yaml"}
    for name in FILES - {"adapter", ".made_by.json"}:
        assert (folder / name).stat().st_size > 1_000, name
    metrics = json.loads((folder / "metrics.json").read_text())
    numbers = _numbers(metrics)
    assert len(numbers) > 50
    assert all(math.isfinite(number) for number in numbers)
    assert metrics["heard_twice"]["saved"] > 0.1
    report = (folder / "report.md").read_text()
    for fact in (
        "ttt_linear", "updates on", "updates off", "base model", "trained without updates", "memory cleared",
        "CC-BY-SA", "fp32_state", "bfloat16", "real-time factor", "A clip presented twice",
    ):  # fmt: skip
        assert fact in report, fact
    model = resolve_repo("builtin:tiny").load_lm()
    injection = load_adapter(model, folder / "adapter")
    assert injection.blocks
    saved = load_file(folder / "adapter" / "adapter.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in injection.named_parameters())

    again = cli("quickstart", "--steps", 2, "--out", "run")
    assert again.exit_code == 2
    assert "--overwrite" in again.said


def test_its_config_trains_with_the_command_train_too(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("train", "quickstart", "max_steps=2", "duration_sec=2")
    assert result.exit_code == 0, result.said
    assert "held out: 1 recordings" in result.said
    assert "held out after step 2" in result.said
    folder = tmp_path / "quickstart-training" / "checkpoints" / "checkpoint_000002" / "adapter"
    assert load_adapter(resolve_repo("builtin:tiny").load_lm(dtype=torch.float32), folder).blocks


OLD = """\
host: {name: moshi, hf_repo: 'builtin:tiny', dtype: float32}
ttt: [{variant: ttt_linear, layers: '1'}]
train: {steps: 40, batch_size: 3, frames: 100, learning_rate: 2.0e-3, gate_learning_rate: 0.02, warmup: 4,
        weight_decay: 0.05, clip: 0.5, text_weight: 0.3, seed: 7}
stream: {seconds: 3}
"""


def test_the_keys_of_earlier_versions_load_and_a_warning_shows_the_new_ones(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    with pytest.warns(FutureWarning, match="Replace 'train' by") as said:
        found = read_settings(Request(out=tmp_path, config=str(tmp_path / "old.yaml"))).run
    assert (found.max_steps, found.batch_size, found.duration_sec, found.max_norm) == (40, 3, 8.0, 0.5)
    assert (found.text_weight, found.seed, found.stream.seconds) == (0.3, 7, 3)
    assert rates(found.optim)["ttt"] == 2e-3
    assert rates(found.optim)["gates"] == 0.02
    assert (found.optim.weight_decay, round(found.optim.pct_start * 40)) == (0.05, 4)
    shown = yaml.safe_load(str(said[0].message).split("Replace 'train' by:")[1])
    assert run_config(**shown).model_copy(update={"stream": found.stream}) == found


def test_a_config_of_a_model_alone_is_trained_with_the_options_of_quickstart(tmp_path, recwarn):
    found = read_settings(Request(out=tmp_path, config="tiny-ttt-linear", steps=9, seed=3))
    ours = read_settings(Request(out=tmp_path, steps=9, seed=3))
    assert found.run == ours.run
    assert (ours.run.max_steps, ours.run.seed, ours.ttt.seed, ours.run.stream.seed) == (9, 3, 3, 3)
    assert not [each for each in recwarn if each.category is FutureWarning]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("data: {train_data: mine.jsonl, eval_data: mine.jsonl}", "use `moshi-ttt train"),
        ("lora: {enable: true}", "lora.enable"),
        ("carry_state: true", "carry_state"),
        ("num_microbatches: 2", "num_microbatches"),
    ],
)
def test_what_only_the_command_train_does_is_refused(cli, tmp_path, changes, message):
    lines = find_config("quickstart").read_text().splitlines()
    key = changes.split(":")[0]
    (tmp_path / "mine.yaml").write_text(
        "\n".join([each for each in lines if not each.startswith(f"{key}:")] + [changes])
    )
    result = cli("quickstart", "--config", "mine.yaml", "--out", "run")
    assert result.exit_code == 2
    assert message in result.said
    assert not (tmp_path / "run").exists()


def test_the_shipped_memory_is_of_the_shipped_model_alone():
    assert shipped_memory(MoshiHostConfig(hf_repo="builtin:tiny")) == memory_adapter()
    assert shipped_memory(MoshiHostConfig(hf_repo="builtin:tiny", config_path="config.json")) is None
    assert shipped_memory(MoshiHostConfig(hf_repo="builtin:tiny", moshi_weights="model.safetensors")) is None
    assert shipped_memory(MoshiHostConfig(hf_repo="kyutai/moshiko-pytorch-bf16")) is None


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.fixture(scope="module")
def trained():
    """A tiny Moshi with blocks, and 80 frames of a document for it."""
    model = resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)
    values = {
        "host": {"name": "moshi", "hf_repo": "builtin:tiny"},
        "ttt": [{"variant": "ttt_linear", "layers": "1", "chunk": 8, "gate": {"init": 1.0}}],
    }
    injection = inject(model, parse_config(values, registry=default_registry()))
    codes = torch.randint(0, model.card, (model.num_codebooks, 80), generator=torch.Generator().manual_seed(0))
    return model, injection, codes


def test_memory_that_is_never_cleared_is_the_memory_of_training(trained):
    model, injection, codes = trained
    whole = evaluate(model, injection.host, codes, name="on").values
    streamed = loss_with_memory_cleared(model, codes, every=1_000)
    assert torch.equal(whole.isnan(), streamed.isnan())
    assert (whole - streamed).nan_to_num().abs().max() < 1e-4


def test_clearing_the_memory_changes_the_loss_from_then_on_and_leaves_attention_alone(trained):
    model, injection, codes = trained
    whole = evaluate(model, injection.host, codes, name="on").values
    cleared = (whole - loss_with_memory_cleared(model, codes, every=48)).nan_to_num().abs()
    assert cleared[: 48 - max(model.delays)].max() < 1e-4
    assert cleared[48:].max() > 1e-3
    injection.remove()
    try:
        base = evaluate(model, injection.host, codes, name="base").values
        assert (base - loss_with_memory_cleared(model, codes, every=48)).nan_to_num().abs().max() < 1e-4
    finally:
        injection.plan.apply(model)


def test_a_verdict_says_no_more_than_the_numbers():
    values = torch.arange(640, dtype=torch.float64).cos() + 3
    same, lower = Curve(name="a", values=values), Curve(name="b", values=values - 0.1)
    noisy = Curve(name="c", values=values + 0.1 * torch.randn(640, generator=torch.Generator().manual_seed(0)))
    assert verdict(compare(lower, same)).startswith("b: 0.1000 nats/token lower than a")
    assert "HIGHER" in verdict(compare(same, lower))
    assert "No clear difference" in verdict(compare(noisy, same))
    assert "No clear difference" in verdict(
        compare(Curve(name="d", values=values[:9]), Curve(name="e", values=values[1:10]))
    )


@pytest.mark.exhaustive  # README's program runs by default
def test_the_example_with_the_python_api_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart_api.py", "2", str(tmp_path / "adapter")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "nats per token" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter.json").is_file()


def _silence(frames: float) -> np.ndarray:
    return np.zeros(int(frames * 640))  # 80 ms at 8 kHz


BAD_AUDIO = {
    "missing": (lambda path: path, "does not exist"),
    "folder": (lambda path: path.mkdir() or path, "is a folder"),
    "empty file": (lambda path: path.write_bytes(b"") or path, "is an empty file"),
    "not audio": (lambda path: path.write_text("I am a letter.\n" * 20) and path, "cannot be read as audio"),
    "truncated": (lambda path: path.write_bytes(b"RIFF\x00\x00\x00\x00WAVEfmt ") and path, "cannot be read as audio"),
    "no samples": (lambda path: write_wav(path, _silence(0)), "no samples"),
    "one frame": (lambda path: write_wav(path, _silence(1)), "1.00 frames of 80 ms; at least 2"),
}


@pytest.mark.first_by_default
@pytest.mark.parametrize("case", BAD_AUDIO)
def test_audio_that_cannot_be_used_is_refused_before_anything_is_written(cli, tmp_path, case):
    make, message = BAD_AUDIO[case]
    path = make(tmp_path / "mine.wav")
    before = sorted(tmp_path.iterdir())
    result = cli("quickstart", "--steps", 1, "--audio", path, "--out", "deep/er/run")
    assert result.exit_code == 2
    assert message in result.said
    assert "Traceback" not in result.said
    assert sorted(tmp_path.iterdir()) == before


def test_samples_that_are_not_numbers_are_refused(tmp_path):
    samples = np.full(8_000, np.nan, dtype="<f4").tobytes()
    header = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVEfmt ", 16, 3, 1, 8_000, 32_000, 4, 32,
                         b"data", len(samples))  # fmt: skip
    (tmp_path / "nan.wav").write_bytes(header + samples)
    with pytest.raises(AudioError, match="8000 of 8000 samples are not finite"):
        read_audio(tmp_path / "nan.wav", 24_000)


def test_overwrite_replaces_what_quickstart_made_and_only_when_it_succeeds(tmp_path):
    def make(number: int, *, fail: bool = False) -> None:
        with new_folder(tmp_path / "run", made_by=running.MADE_BY, overwrite=True) as folder:
            (folder / "metrics.json").write_text(json.dumps({"made_by": running.MADE_BY, "number": number}))
            if fail:
                raise RuntimeError("half-way")

    make(1)
    with pytest.raises(RuntimeError):
        make(2, fail=True)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["number"] == 1
    make(3)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["number"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["notes.txt", "adapter/mine.txt", "empty/"])
def test_overwrite_does_not_delete_what_was_put_beside_a_result(tmp_path, name):
    def make() -> None:
        with new_folder(tmp_path / "run", made_by=running.MADE_BY, overwrite=True) as folder:
            (folder / "adapter").mkdir()
            (folder / "adapter" / "adapter.json").touch()

    make()
    mine = tmp_path / "run" / name
    mine.mkdir() if name.endswith("/") else mine.write_text("years of work")
    with pytest.raises(OutputError, match=f"holds {name.rstrip('/')}, which .* did not put there"):
        make()
    assert mine.exists()
    mine.rmdir() if name.endswith("/") else mine.unlink()
    (tmp_path / "run" / ".DS_Store").touch()  # of a file manager
    make()


@pytest.mark.parametrize("marker", ["", '{"made_by": "moshi-ttt evaluate recall", "files": ["thesis.tex"]}', "[]"])
def test_overwrite_replaces_what_this_command_made_and_no_other(tmp_path, marker):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".made_by.json").write_text(marker)
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"made_by": running.MADE_BY}))  # anyone's may say so
    with (
        pytest.raises(OutputError, match="not empty and was not made by"),
        new_folder(tmp_path / "run", made_by=running.MADE_BY, overwrite=True),
    ):
        pass
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_a_folder_with_something_else_is_not_replaced(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for extra in ((), ("--overwrite",)):
        result = cli("quickstart", "--out", "run", *extra)
        assert result.exit_code == 2
        assert "not empty" in result.said
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_not_replaced(cli, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert cli("quickstart", "--out", "run", "--overwrite").exit_code == 2
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.exhaustive  # any command alike: test_cli.py
@pytest.mark.first_by_default
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "failure"])
def test_a_run_that_ends_early_leaves_nothing(cli, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(running, "train", fail)
    if isinstance(error, KeyboardInterrupt):
        result = cli("quickstart", "--out", "some/run")
        assert result.exit_code == 130
        assert "Interrupted" in result.said
    else:
        with pytest.raises(RuntimeError):
            cli("quickstart", "--out", "some/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("train: {stepz: 3}", "'stepz'. Did you mean 'steps'"),
        ("train: {steps: 0}", "steps = 0"),
        ("train: {frames: 100000}", "frames. Set it to"),
        ("stream: {seconds: -1}", "seconds = -1"),
        ("ttt: []", "no blocks"),
    ],
)
def test_bad_options_are_refused(cli, tmp_path, section, message):
    lines = {"host": "{name: moshi, hf_repo: 'builtin:tiny'}", "ttt": "[{variant: ttt_linear, layers: '1'}]"}
    key, value = section.split(": ", 1)
    lines[key] = value
    (tmp_path / "mine.yaml").write_text("\n".join(f"{key}: {value}" for key, value in lines.items()))
    result = cli("quickstart", "--config", "mine.yaml", "--out", "run")
    assert result.exit_code == 2
    assert message in result.said
    assert not (tmp_path / "run").exists()


def test_an_inner_learning_rate_that_overflows_is_refused(cli, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "host: {name: moshi, hf_repo: 'builtin:tiny', dtype: float32}\n"
        "ttt: [{variant: ttt_linear, layers: '1', base_lr: 1.0e+38}]\n"
        "train: {steps: 3, frames: 48, batch_size: 1}\n"
    )
    result = cli("quickstart", "--config", "mine.yaml", "--out", "run")
    assert result.exit_code == 2
    assert "base_lr 1e+38 gives a token the rate" in result.said
    assert "Lower base_lr." in result.said
    assert not (tmp_path / "run").exists()
