"""A run from its config to what it leaves: steps, checkpoints, exports, and going on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moshi.models import loaders
from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry, load_adapter
from moshi_ttt.apps.train import model as module
from moshi_ttt.apps.train import run as running
from moshi_ttt.apps.train.checkpoint import CheckpointError, find_checkpoints
from moshi_ttt.apps.train.data.manifest import DataError
from moshi_ttt.apps.train.trainer import Trainer, TrainingError
from moshi_ttt.core.errors import ConfigError, HostError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import resolve_repo

from .conftest import FRAMES, records

LORA = {"enable": True, "rank": 2, "scaling": 2.0}
TTT = [{"variant": "ttt_linear", "layers": "1,3", "chunk": 4}]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def base_model():
    return resolve_repo("builtin:tiny").load_lm(dtype=torch.float32)


def codes(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (1, 17, 20), generator=torch.Generator().manual_seed(seed))


# ---- what a run does


def test_a_run_trains_logs_and_saves(train, tmp_path):
    outcome = train(max_steps=6, ckpt_freq=2, num_ckpt_keep=2, optim={"lr": 3e-3})
    assert (outcome.step, outcome.stopped) == (6, False)
    logged = records(tmp_path / "run")
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6]
    for record in logged:
        assert record["loss"] == pytest.approx(record["loss_text"] + record["loss_audio"])
        assert record["perplexity_audio"] == pytest.approx(torch.tensor(record["nats_audio"]).exp().item(), rel=1e-4)
        assert record["tokens_per_second"] > 0
        assert record["memory_bytes"] > 1e6
    saved = find_checkpoints(tmp_path / "run")
    assert [folder.name for folder in saved] == ["checkpoint_000004", "checkpoint_000006"]
    assert outcome.checkpoint == saved[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    first, last = (adapter(folder) for folder in saved)
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_first_loss_is_that_of_the_model_and_the_data(train, settings, tmp_path):
    # By the public pieces alone: the base model, the blocks of the plan, the rows of the first step.
    train(max_steps=1)
    setup = settings()
    model = base_model()
    from moshi_ttt import inject
    from moshi_ttt.apps.train.data.codec import SpeechCodec
    from moshi_ttt.apps.train.data.corpus import open_corpus
    from moshi_ttt.apps.train.data.dataset import TrainingData
    from moshi_ttt.apps.train.losses import LossWeights, count, loss_sums

    bundle = resolve_repo("builtin:tiny")
    codec = SpeechCodec.of(model, bundle.load_mimi(), bundle.tokenizer())
    corpus = open_corpus(setup.run.data.train_data, codec, frames=FRAMES)
    data = TrainingData(
        corpus, batch_size=2, microbatches=1, rank=0, world_size=1, seed=0, shuffle=True, carry=False
    )  # fmt: skip
    inject(model, setup.ttt)
    weights = LossWeights(first_codebook=1.0, text_padding=0.5)
    rows = data[0].codes
    sums, counts = loss_sums(model, rows, weights).detach(), count(model, rows, weights)
    expected = float(sums[0] / counts[0] + sums[1] / counts[1])
    assert records(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_training_lowers_the_loss_on_what_it_trains_on(train, encoded, tmp_path):
    data = {"train_data": str(encoded), "eval_data": str(encoded)}
    rates = {"lr": 3e-3, "lr_groups": {"gates": 0.03}}
    train(data=data, do_eval=True, eval_freq=1, max_steps=25, batch_size=4, optim=rates)
    losses = [record["nats_audio"] for record in records(tmp_path / "run", "eval")]
    assert len(losses) == 25
    assert losses[-1] < losses[0] - 0.02


def test_health_is_logged_for_every_block(train, tmp_path):
    train(max_steps=2, log_health=True, ttt=[{"variant": "ttt_mlp", "layers": "1", "chunk": 4}])
    for record in records(tmp_path / "run"):
        (block,) = record["blocks"].values()
        assert block["gate"] > 0
        assert block["inner_loss_after"] != block["inner_loss_before"]
        assert isinstance(block["red_flags"], list)


def test_what_learns_nothing_is_named(settings, capsys):
    # A segment of 12 frames, and a chunk of 16: nothing that is written to memory is ever read.
    for chunk, idle in ((16, True), (4, False)):
        chosen = settings(
            ttt=[{"variant": "gating_mlp", "layers": "1", "chunk": chunk, "lr": 0.3}], max_steps=2,
            overwrite_run_dir=True,
        )  # fmt: skip
        running.run(chosen, default_registry(), Console(width=200))
        assert ("got no gradient" in capsys.readouterr().out) is idle


def test_what_is_trained_is_checked_against_the_config(settings, monkeypatch):
    def forgetful(built, *, full, embeddings):
        real(built, full=full, embeddings=embeddings)
        next(iter(built.injection.parameters())).requires_grad_(False)

    real = module.choose_trained
    monkeypatch.setattr(module, "choose_trained", forgetful)
    with pytest.raises(HostError, match="not what the config declares"):
        running.run(settings(), default_registry(), Console(quiet=True))


def test_curves_go_to_tensorboard_and_wandb_where_asked_for(train, tmp_path, monkeypatch):
    scalars, logged, started = [], [], {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, name, value, step):
            scalars.append((name, step, value))

        def close(self):
            scalars.append("closed")

    def begin(**options):
        started.update(options)
        return SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=begin, login=lambda key: started.update(key=key)))
    train(max_steps=2, tensorboard=True, wandb={"project": "p", "offline": True, "key": "secret"})
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert [value for name, _, value in scalars[:-1] if name == "train/loss"] == losses
    assert scalars[-1] == "closed"
    assert [(step, numbers["train/loss"]) for step, numbers in logged] == [(1, losses[0]), (2, losses[1])]
    assert (started["project"], started["mode"], started["key"]) == ("p", "offline", "secret")
    assert "secret" not in str(started["config"])


def test_measuring_changes_nothing(train, tmp_path):
    for index, health in enumerate((False, True)):
        train(run_dir=str(tmp_path / f"run{index}"), log_health=health)
    first, second = ([record["loss"] for record in records(tmp_path / f"run{index}")] for index in range(2))
    assert first == second


@pytest.mark.parametrize("carry", [False, True])
def test_evaluating_changes_nothing(train, encoded, tmp_path, carry):
    data = {"train_data": str(encoded), "eval_data": str(encoded)}
    for index, changes in enumerate(({}, {"do_eval": True, "eval_freq": 1})):
        train(run_dir=str(tmp_path / f"run{index}"), data=data, carry_state=carry, **changes)
    assert same(*(adapter(find_checkpoints(tmp_path / f"run{index}")[-1]) for index in range(2)))
    assert len(records(tmp_path / "run1", "eval")) == 4


def test_carrying_gives_other_numbers_than_not_carrying(train, encoded, tmp_path):
    for index, carry in enumerate((False, True)):
        data = {"train_data": str(encoded), "shuffle": False}
        train(run_dir=str(tmp_path / f"run{index}"), data=data, carry_state=carry, batch_size=1, max_steps=3)
    plain, carried = ([record["loss"] for record in records(tmp_path / f"run{index}")] for index in range(2))
    assert plain[0] == carried[0]  # the first segment of the first recording, from the learned state
    assert plain[1] != carried[1]


# ---- going on


@pytest.mark.parametrize(
    "changes",
    [
        {"ttt": TTT, "carry_state": True, "num_microbatches": 2},
        {"ttt": [{"variant": "gating_mlp", "layers": "2", "chunk": 4}], "lora": LORA},
        {"ttt": [], "full_finetuning": True, "gradient_checkpointing": True},
    ],
    ids=["carried", "with LoRA", "full"],
)
def test_a_run_that_is_resumed_ends_bit_for_bit_where_one_that_was_not(train, tmp_path, changes):
    straight, parted = (str(tmp_path / name) for name in ("straight", "parted"))
    train(run_dir=straight, max_steps=4, **changes)
    train(run_dir=parted, max_steps=4, ckpt_freq=2, num_ckpt_keep=None, **changes)
    for late in find_checkpoints(Path(parted))[1:]:
        (late / "state.json").unlink()  # as if it had been killed after step 2
    train(run_dir=parted, max_steps=4, resume=True, **changes)
    first, second = (find_checkpoints(Path(folder))[-1] for folder in (straight, parted))
    assert [r["loss"] for r in records(Path(straight))] == [r["loss"] for r in records(Path(parted))]
    for name in ("adapter/adapter.safetensors", "consolidated/consolidated.safetensors"):
        assert (first / name).is_file() == (second / name).is_file()
        if (first / name).is_file():
            assert same(load_file(first / name), load_file(second / name))


def test_resuming_where_there_is_nothing_starts(train):
    assert train(resume=True, max_steps=1).step == 1


def test_a_run_that_is_done_is_done(train):
    train(max_steps=2)
    assert train(max_steps=2, resume=True).step == 2


def test_going_on_from_a_checkpoint_by_its_path(train, tmp_path):
    first = train(max_steps=2)
    outcome = train(run_dir=str(tmp_path / "other"), max_steps=3, resume=str(first.checkpoint))
    assert outcome.step == 3
    assert [record["step"] for record in records(tmp_path / "other")] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "num_microbatches"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"carry_state": True}, "carry_state was False"),
        ({"duration_sec": 2.0}, "duration_sec"),
        ({"lora": LORA}, "trained other parameters"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(train, changes, message):
    train(max_steps=1)
    with pytest.raises(CheckpointError, match=message):
        train(max_steps=2, resume=True, **changes)


@pytest.mark.parametrize("wrong", ["state.json", "resume/.metadata", "resume/__0_0.distcp"])
def test_a_damaged_checkpoint_is_refused(train, tmp_path, wrong):
    folder = train(max_steps=1).checkpoint
    (folder / wrong).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="checkpoint_000001"):
        train(max_steps=2, resume=True)


def test_what_a_killed_save_left_is_swept_away(train, tmp_path):
    train(max_steps=1)
    left = tmp_path / "run" / "checkpoints" / ".checkpoint_000002"
    (left / "resume").mkdir(parents=True)
    assert train(max_steps=2, resume=True).step == 2
    assert not list(left.parent.glob(".*"))


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(train, tmp_path, monkeypatch, number):
    real = Trainer.make_step

    def make_step(self, *args, **kwargs):
        step = real(self, *args, **kwargs)
        if step.number == 2:
            os.kill(os.getpid(), number)
        return step

    monkeypatch.setattr(Trainer, "make_step", make_step)
    before = signal.getsignal(number)
    outcome = train(max_steps=50)
    assert (outcome.step, outcome.stopped) == (3, True)
    assert outcome.checkpoint.name == "checkpoint_000003"
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert train(max_steps=4, resume=True).step == 4


def test_a_step_that_is_not_finite_is_skipped_and_many_in_a_row_stop(train, tmp_path, monkeypatch):
    real = running.TrainingData.__getitem__
    poisoned = {1}
    from moshi_ttt.apps.train import trainer as stepping

    def loss_sums(model, part, weights):
        found = real_sums(model, part, weights)
        return found * float("nan") if calls.append(0) or len(calls) - 1 in poisoned else found

    real_sums, calls = stepping.loss_sums, []
    monkeypatch.setattr(stepping, "loss_sums", loss_sums)
    assert real is running.TrainingData.__getitem__
    train(max_steps=3, ckpt_freq=1)
    assert [record["skipped"] for record in records(tmp_path / "run")] == [False, True, False]
    saved = find_checkpoints(tmp_path / "run")
    assert same(adapter(saved[0]), adapter(saved[1]))
    assert not same(adapter(saved[1]), adapter(saved[2]))
    calls.clear()
    poisoned.update(range(10))
    with pytest.raises(TrainingError, match=r"2 steps in a row.*gradients: .*Lower optim.lr"):
        train(max_steps=10, overwrite_run_dir=True, max_bad_steps=2)


# ---- the folder


def test_a_folder_in_use_is_refused(train, tmp_path):
    train(max_steps=1)
    with pytest.raises(ConfigError, match=r"resume: true.*overwrite_run_dir: true"):
        train(max_steps=1)
    assert train(max_steps=1, overwrite_run_dir=True).step == 1
    assert len(records(tmp_path / "run")) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_is_never_touched(train, tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no run made it"):
        train(overwrite_run_dir=overwrite)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_path_that_is_no_checkpoint_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        train(resume=str(tmp_path / "nowhere"))


def test_segments_that_cannot_be_read_stop_a_run_when_they_are_too_many(train, encoded, tmp_path, capsys):
    import shutil

    folder = tmp_path / "speech"
    shutil.copytree(encoded.parent, folder)
    samples = (folder / "talk0.wav").read_bytes()
    (folder / "talk0.wav").write_bytes(samples[: len(samples) // 2 // 4 * 4])
    data = {"train_data": str(folder / "train.jsonl"), "max_bad_share": 0.9}
    assert train(data=data, max_steps=4).step == 4
    assert "train.jsonl:1" in capsys.readouterr().out
    with pytest.raises(DataError, match="max_bad_share"):
        train(data={**data, "max_bad_share": 0.1}, max_steps=30, overwrite_run_dir=True)


# ---- what others use


def test_an_adapter_gives_the_trained_model(train):
    outcome = train(lora=LORA, max_steps=2)
    model = base_model()
    load_adapter(model, outcome.checkpoint / "adapter")
    assert not same({"x": model(codes()).text_logits}, {"x": base_model()(codes()).text_logits})
    stock = loaders.get_moshi_lm(
        resolve_repo("builtin:tiny").info.moshi_weights,
        lm_kwargs=own_config(outcome.checkpoint),
        lora_weights=outcome.checkpoint / "consolidated" / "lora.safetensors",
        dtype=torch.float32,
    )
    for site in MOSHI_HOST.blocks(model).values():
        for gate in site.gate_parameters():
            gate.data.zero_()  # what is left is the LoRA
    torch.testing.assert_close(model(codes()).text_logits, stock(codes()).text_logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [{"lora": LORA, "save_adapters": False}, {"full_finetuning": True}])
def test_merged_weights_are_a_moshi_and_the_blocks_belong_to_it(train, settings, changes):
    outcome = train(max_steps=2, **changes)
    folder = outcome.checkpoint / "consolidated"
    stock = loaders.get_moshi_lm(
        folder / "consolidated.safetensors", lm_kwargs=own_config(outcome.checkpoint), dtype=torch.float32
    )
    base = base_model()
    assert stock.state_dict().keys() == base.state_dict().keys()
    assert not torch.equal(stock.text_linear.weight, base.text_linear.weight)
    load_adapter(stock, outcome.checkpoint / "adapter")
    with pytest.raises(Exception, match="another base model"):
        load_adapter(base, outcome.checkpoint / "adapter")


def own_config(checkpoint: Path) -> dict:
    config = json.loads((checkpoint / "consolidated" / "config.json").read_text())
    for name in ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_type", "lm_gen_config"):
        config.pop(name, None)
    return config


def test_embeddings_beside_blocks_need_merged_weights(train):
    with pytest.raises(ConfigError, match="save_adapters: false"):
        train(lora={**LORA, "ft_embed": True})
    outcome = train(lora={**LORA, "ft_embed": True}, ttt=[], max_steps=1)
    names = load_file(outcome.checkpoint / "consolidated" / "lora.safetensors").keys()
    assert "text_emb.weight" in names
    assert any(name.endswith("lora_B.weight") for name in names)


def test_nothing_is_saved_when_asked_not_to(train, tmp_path):
    assert train(do_ckpt=False, max_steps=1).checkpoint is None
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ttt_mlp", "gating_mlp"])
def test_compiled_blocks_train_alike(train, tmp_path, variant):
    blocks = [{"variant": variant, "layers": "2", "chunk": 6}]
    for index, compiled in enumerate((False, True)):
        train(run_dir=str(tmp_path / f"run{index}"), ttt=blocks, compile=compiled, max_steps=3, carry_state=True)
    first, second = ([record["loss"] for record in records(tmp_path / f"run{index}")] for index in range(2))
    assert first == pytest.approx(second, rel=1e-5)
