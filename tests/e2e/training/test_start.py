"""Starting a run from an adapter: training in two stages."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from rich.console import Console

from moshi_ttt import default_registry
from moshi_ttt.core.errors import AdapterError
from moshi_ttt.training import run as running
from moshi_ttt.training.checkpoint import find_checkpoints
from moshi_ttt.training.model import skeleton
from tests.e2e.integration.test_adapter_loading import Draws, poisoned_memory
from tests.small_moshi import small_moshi

from .conftest import LORA, TTT, adapter

STILL = {"lr": 0.0, "lr_groups": {"ttt": 0.0, "gates": 0.0}}
"""Rates under which nothing moves: what is saved is what training started from."""


@pytest.fixture
def first(trained):
    """A trained adapter of blocks and LoRA, and one of blocks alone."""
    return partial(trained, "first", max_steps=2)


@pytest.mark.first_by_default
@pytest.mark.parametrize("place", ["", "adapter"])
@pytest.mark.parametrize("named", [True, False], ids=["ttt given", "ttt left out"])
def test_a_run_starts_from_an_adapters_values(train, first, place, named):
    checkpoint = first()
    blocks = {"ttt": TTT} if named else {"ttt": None}
    outcome = train(adapter=str(checkpoint / place), max_steps=1, optim=STILL, **blocks)
    start, end = adapter(checkpoint), adapter(outcome.checkpoint)
    assert start.keys() == end.keys()
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())


def test_lora_is_taken_along_and_lora_is_added(train, first):
    checkpoint = first(lora=LORA)
    kept = adapter(train(adapter=str(checkpoint), lora=LORA, max_steps=1, optim=STILL).checkpoint)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(checkpoint).items())
    checkpoint = first()
    outcome = train(adapter=str(checkpoint), lora=LORA, max_steps=1, optim=STILL, overwrite_run_dir=True)
    added = adapter(outcome.checkpoint)
    assert all(torch.equal(tensor, added[name]) for name, tensor in adapter(checkpoint).items())
    assert all(not tensor.any() for name, tensor in added.items() if "lora_B" in name)


@pytest.mark.exhaustive  # a run that is resumed goes on bit for bit: test_resume.py
def test_a_run_that_is_resumed_does_not_start_again(train, first, tmp_path):
    checkpoint = first()
    train(adapter=str(checkpoint), max_steps=4, ckpt_freq=2, num_ckpt_keep=None)
    straight = adapter(find_checkpoints(tmp_path / "run")[-1])
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    shutil.rmtree(checkpoint)
    train(adapter=str(checkpoint), max_steps=4, resume=True)
    resumed = adapter(find_checkpoints(tmp_path / "run")[-1])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_other_options_are_pointed_out(settings, first, capsys):
    checkpoint = first()
    other = settings(adapter=str(checkpoint), max_steps=1, ttt=[{**TTT[0], "base_lr": 0.5}])
    running.run(other, default_registry(), Console(width=500))
    shown = capsys.readouterr().out
    assert f"starting from the values of {checkpoint / 'adapter'}" in shown
    assert "layers.1.sequence: the adapter was trained with other options: base_lr was 1.0 and is 0.5." in shown
    assert "moves a parameter by" in shown  # the column
    assert "stay almost as they were drawn" not in shown, "trained blocks may be moved a little"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ttt": [{**TTT[0], "layers": "1"}]},
            r"layers.1.sequence \(ttt_linear\), layers.3.sequence .* and this model",
        ),
        ({"ttt": [{**TTT[0], "variant": "ttt_mlp"}]}, r"this model has layers.1.sequence \(ttt_mlp\)"),
        ({"ttt": [{**TTT[0], "chunk": 5}]}, r"expected \[5\]"),
        ({"lora": {"enable": False}}, "beside the base model, and this model has nothing"),
        ({"lora": {**LORA, "rank": 3}}, "'rank': 3"),
        ({"adapter": "nowhere"}, "nowhere is no adapter, and no checkpoint that holds one"),
        ({"adapter": "nowhere", "ttt": None}, "nowhere is no adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(train, first, tmp_path, changes, message):
    checkpoint = first(lora=LORA)
    with pytest.raises(AdapterError, match=message):
        train(**{"adapter": str(checkpoint), "lora": LORA, "max_steps": 1, **changes})
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_model_is_refused(train, first, tmp_path):
    checkpoint = first(lora=LORA, save_adapters=False)  # its blocks belong to the merged weights
    with pytest.raises(AdapterError, match="another base model"):
        train(adapter=str(checkpoint), max_steps=1)
    merged = {"moshi_path": str(checkpoint / "consolidated" / "consolidated.safetensors")}
    outcome = train(
        adapter=str(checkpoint), max_steps=1, optim=STILL, moshi_paths={"hf_repo_id": small_moshi(), **merged}
    )
    end = adapter(outcome.checkpoint)
    assert all(torch.equal(tensor, end[name]) for name, tensor in adapter(checkpoint).items())


@pytest.mark.exhaustive  # counts work; what a file gives is compared in this file
@pytest.mark.first_by_default
@pytest.mark.parametrize("start", ["adapter", "checkpoint"])
def test_values_that_come_from_a_file_are_not_drawn_first(settings, train, first, monkeypatch, start):
    """A run that starts from an adapter, or is resumed, fills blocks and LoRA from it, and draws no value for them."""
    ttt = [{**TTT[0], "gate": {"alpha": "fixed", "init": 0.25}}, {"variant": "gating_mlp", "layers": "0", "chunk": 4}]
    checkpoint = first(lora=LORA, ttt=ttt)
    drawn: list[int] = []
    real = running.build

    def counted(chosen, *args, registry, **options):
        with Draws() as draws:
            built = real(chosen, *args, registry=registry, **options)
        with Draws() as of_moshi:  # which draws for some of its layers even on the meta device
            skeleton(chosen, registry)
        drawn.append(draws.count - of_moshi.count)
        return built

    monkeypatch.setattr(running, "build", counted)
    same = {"lora": LORA, "ttt": ttt, "optim": STILL, "overwrite_run_dir": True}
    origin = {"adapter": str(checkpoint)} if start == "adapter" else {"resume": str(checkpoint)}
    with poisoned_memory():
        outcome = train(**same, **origin, max_steps=3)
    end = adapter(outcome.checkpoint)
    assert all(torch.equal(tensor, end[name]) for name, tensor in adapter(checkpoint).items())
    assert drawn == [0]
    train(**same, max_steps=1)
    parameters = sum(tensor.numel() for tensor in end.values())
    assert drawn[1] > parameters / 4  # without a file they are drawn
