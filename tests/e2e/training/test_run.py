"""A run from its config to what it leaves: steps, checkpoints, exports, and going on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moshi.models import loaders
from rich.console import Console
from safetensors.torch import load_file

from moshi_ttt import default_registry, load_adapter
from moshi_ttt.configs.settings import parse_settings
from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.errors import ConfigError, HostError, InjectionError
from moshi_ttt.core.health import HealthMonitor
from moshi_ttt.core.injection import Injection
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.training import model as module
from moshi_ttt.training import run as running
from moshi_ttt.training.checkpoint import find_checkpoints
from moshi_ttt.training.step import TrainingError
from tests.small_moshi import QUEUES, small_moshi
from tests.unit.plugins.test_convolution_cache import Unscaled, registry_of

from .conftest import FRAMES, LORA, adapter, records, same, values


def base_model():
    return resolve_repo(small_moshi()).load_lm(dtype=torch.float32)


def codes(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (1, QUEUES, 20), generator=torch.Generator().manual_seed(seed))


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
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.data.corpus import open_corpus
    from moshi_ttt.data.dataset import TrainingData
    from moshi_ttt.hosts.moshi.losses import MoshiLosses

    bundle = resolve_repo(small_moshi())
    codec = SpeechCodec.of(model, bundle.load_mimi(), bundle.tokenizer())
    corpus = open_corpus(setup.run.data.train_data, codec, frames=FRAMES)
    data = TrainingData(
        corpus, batch_size=2, microbatches=1, rank=0, world_size=1, seed=0, shuffle=True, carry=False
    )  # fmt: skip
    inject(model, setup.ttt)
    losses = MoshiLosses(text_padding=0.5)
    rows = data[0].codes
    expected = float((losses.sums(model, rows)[0].detach() / losses.weights(model, rows)[0]).sum())
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
    assert len(records(tmp_path / "run")) == 2
    for record in records(tmp_path / "run"):
        (block,) = record["blocks"].values()
        assert block["gate"] > 0
        assert block["inner_loss_after"] != block["inner_loss_before"]
        assert isinstance(block["red_flags"], list)


@pytest.mark.exhaustive  # counts work; that health is logged is tested above
@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("every", "last", "wanted"), [(3, 7, [1, 2, 3, 6, 7]), (1, 3, [1, 2, 3]), (100, 5, [1, 2, 4, 5])]
)
def test_health_is_measured_in_the_first_steps_and_at_its_interval(train, tmp_path, monkeypatch, every, last, wanted):
    entered, calls = [], []
    enter, statistics = HealthMonitor.__enter__, HybridBlock.statistics
    monkeypatch.setattr(HealthMonitor, "__enter__", lambda self: entered.append(self) or enter(self))
    monkeypatch.setattr(
        HybridBlock, "statistics", lambda self, x, context: calls.append(self.info.site) or statistics(self, x, context)
    )
    train(
        max_steps=last, health_freq=every, log_freq=last, log_health=True, gradient_checkpointing=True, batch_size=1,
        num_microbatches=2,
    )  # fmt: skip
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines if "blocks" in line] == wanted == [line["step"] for line in lines]
    assert len(entered) == len(wanted)
    assert len(calls) == 2 * len(wanted)  # two blocks, once each: not for each micro-batch, nor again in backward
    default = RunConfig.model_fields["health_freq"].default
    assert default > 1


def test_a_red_flag_is_said_once_and_logged_each_time(settings, tmp_path, capsys):
    chosen = settings(
        ttt=[{"variant": "ttt_mlp", "layers": "1", "chunk": 4, "base_lr": 1e4}], max_steps=3, log_health=True
    )  # fmt: skip
    running.run(chosen, default_registry(), Console(width=200))
    said = capsys.readouterr().out
    assert said.count("the block at layers.1.sequence is not healthy") == 1
    assert "lower the inner learning rate" in said
    assert [bool(line["blocks"]["layers.1.sequence"]["red_flags"]) for line in records(tmp_path / "run")] == [True] * 3


def test_what_learns_nothing_is_named(settings, capsys):
    # A segment of 12 frames, and a chunk of 16: nothing that is written to memory is ever read.
    for chunk, carry, idle in ((16, False, True), (4, False, False), (4, True, False)):
        chosen = settings(
            ttt=[{"variant": "gating_mlp", "layers": "1", "chunk": chunk, "lr": 0.3}], max_steps=2,
            overwrite_run_dir=True, carry_state=carry,
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


@pytest.mark.first_by_default
@pytest.mark.parametrize("carry", [False, True])
def test_evaluating_changes_nothing(train, encoded, tmp_path, carry):
    data = {"train_data": str(encoded), "eval_data": str(encoded)}
    for index, changes in enumerate(({}, {"do_eval": True, "eval_freq": 1})):
        train(run_dir=str(tmp_path / f"run{index}"), data=data, carry_state=carry, **changes)
    assert same(*(adapter(find_checkpoints(tmp_path / f"run{index}")[-1]) for index in range(2)))
    assert len(records(tmp_path / "run1", "eval")) == 4


@pytest.mark.first_by_default
@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp", "ttt_multilayer", "gating_mlp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_segment_shorter_than_a_chunk_carries_its_state(train, tmp_path, variant, checkpointing):
    # Nothing is updated in the first segment: the state is still what it started from, a parameter's own storage.
    blocks = [{"variant": variant, "layers": "1,2", "chunk": 16}]
    train(ttt=blocks, carry_state=True, gradient_checkpointing=checkpointing, max_steps=5)
    assert all(record["loss"] > 0 for record in records(tmp_path / "run"))


def test_held_out_recordings_that_cannot_be_read_are_left_out_and_too_many_stop(train, encoded, tmp_path, capsys):
    folder = tmp_path / "speech"
    shutil.copytree(encoded.parent, folder)
    samples = (folder / "talk1.wav").read_bytes()
    (folder / "talk1.wav").write_bytes(samples[: len(samples) // 2 // 4 * 4])
    data = {"train_data": str(encoded), "eval_data": str(folder / "train.jsonl"), "max_bad_share": 0.5}
    train(data=data, do_eval=True, max_steps=2)
    (record,) = records(tmp_path / "run", "eval")
    assert record["bad_segments"] >= 1
    assert "train.jsonl:2" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="held-out segments could not be read"):
        train(data={**data, "max_bad_share": 0.01}, do_eval=True, max_steps=2, overwrite_run_dir=True)
    assert find_checkpoints(tmp_path / "run"), "what was trained is saved first"


def test_shards_that_were_cut_otherwise_are_pointed_out(settings, capsys):
    running.run(settings(duration_sec=2.0, max_steps=1), default_registry(), Console(width=500))
    assert "was encoded in segments of 12 frames and is read in segments of 25" in capsys.readouterr().out


@pytest.mark.exhaustive  # carried state: tests/unit/hosts/test_carry.py
def test_carrying_gives_other_numbers_than_not_carrying(train, encoded, tmp_path):
    for index, carry in enumerate((False, True)):
        data = {"train_data": str(encoded), "shuffle": False}
        train(run_dir=str(tmp_path / f"run{index}"), data=data, carry_state=carry, batch_size=1, max_steps=3)
    plain, carried = ([record["loss"] for record in records(tmp_path / f"run{index}")] for index in range(2))
    assert plain[0] == carried[0]  # the first segment of the first recording, from the learned state
    assert plain[1] != carried[1]


# ---- what others use


def test_an_adapter_gives_the_trained_model(train):
    outcome = train(lora=LORA, max_steps=2)
    model = base_model()
    load_adapter(model, outcome.checkpoint / "adapter")
    assert not same({"x": model(codes()).text_logits}, {"x": base_model()(codes()).text_logits})
    stock = loaders.get_moshi_lm(
        resolve_repo(small_moshi()).info.moshi_weights,
        lm_kwargs=own_config(outcome.checkpoint),
        lora_weights=outcome.checkpoint / "consolidated" / "lora.safetensors",
        dtype=torch.float32,
    )
    for site in MOSHI_HOST.blocks(model).values():
        for gate in site.gate_parameters():
            gate.data.zero_()  # what is left is the LoRA
    torch.testing.assert_close(model(codes()).text_logits, stock(codes()).text_logits, rtol=0, atol=2e-6)


@pytest.mark.first_by_default
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


@pytest.mark.first_by_default
@pytest.mark.parametrize(
    ("changes", "lacking"),
    [({"lora": LORA}, True), ({"full_finetuning": True}, True), ({"lora": LORA, "ttt": []}, False), ({}, False)],
)
def test_consolidated_weights_say_that_they_lack_the_blocks(settings, tmp_path, capsys, changes, lacking):
    running.run(settings(max_steps=1, **changes), default_registry(), Console(width=500))
    note = tmp_path / "run" / "checkpoints" / "checkpoint_000001" / "consolidated" / "README.txt"
    assert note.is_file() is lacking
    assert ("does not hold the test-time-training blocks" in capsys.readouterr().out) is lacking
    if lacking:
        assert "adapter/" in note.read_text()


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


def test_a_rising_inner_learning_rate_that_a_block_ignores_is_refused(encoded, tmp_path):
    registry = registry_of(Unscaled)
    chosen = {
        **values(encoded, tmp_path / "run"), "inner_lr_warmup": True,
        "ttt": [{"variant": "convolved", "layers": "1", "chunk": 4}],
    }  # fmt: skip
    with pytest.raises(InjectionError, match=r"layers.1.sequence \(Unscaled\).*Leave inner_lr_warmup out"):
        module.skeleton(parse_settings(chosen, registry=registry, where="test"), registry)


@pytest.mark.exhaustive  # the factor itself: the kit's check_inner_lr_factor
def test_the_inner_learning_rate_rises_with_the_main_one(train, monkeypatch):
    factors = []
    set_factor = Injection.set_inner_lr_factor
    monkeypatch.setattr(
        Injection, "set_inner_lr_factor", lambda self, factor: (factors.append(factor), set_factor(self, factor))
    )
    train(inner_lr_warmup=True, optim={"lr": 1e-3, "pct_start": 0.5}, max_steps=4)
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "its share in a step, and all of it afterwards"
    factors.clear()
    train(optim={"lr": 1e-3, "pct_start": 0.5}, max_steps=2, overwrite_run_dir=True)
    assert set(factors) == {1.0}
