"""Starting a run from what a fine-tuning wrote: its LoRA, or its merged weights; and adapters of either."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moshi_ttt import default_registry
from moshi_ttt.core.errors import AdapterError, ConfigError, HostError
from moshi_ttt.evaluation.models import load_models
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.tiny import bundle_folder
from moshi_ttt.training.checkpoint import find_checkpoints
from tests.small_moshi import small_moshi

from .conftest import LORA, TTT, adapter, values

STILL = {"lr": 0.0, "lr_groups": {"ttt": 0.0, "gates": 0.0}}
"""Rates under which nothing moves: what is saved is what training started from."""
EMBEDDED = {**LORA, "ft_embed": True}


@pytest.fixture(scope="module")
def tuned(encoded, tmp_path_factory):
    """``consolidated/`` of a run with LoRA alone, as moshi-finetune writes it, by whether embeddings were trained."""
    from rich.console import Console

    from moshi_ttt.configs.settings import parse_settings
    from moshi_ttt.training.run import run

    def make(lora):
        folder = tmp_path_factory.mktemp("tuned") / "run"
        chosen = {**values(encoded, folder), "ttt": [], "lora": lora, "max_steps": 2, "optim": {"lr": 0.01}}
        settings = parse_settings(chosen, registry=default_registry(), where="test")
        outcome = run(settings, default_registry(), Console(quiet=True))
        return outcome.checkpoint / "consolidated"

    return {name: make(lora) for name, lora in (("plain", LORA), ("embedded", EMBEDDED))}


def paths(consolidated):
    return {"hf_repo_id": small_moshi(), "config_path": str(consolidated / "config.json")}


def host_of(consolidated) -> MoshiHostConfig:
    return MoshiHostConfig(hf_repo=small_moshi(), dtype="float32", config_path=str(consolidated / "config.json"))


def test_blocks_are_trained_on_a_merged_lora_and_evaluated_on_it(train, tuned):
    outcome = train(moshi_paths=paths(tuned["plain"]), max_steps=1)
    config = json.loads((outcome.checkpoint / "adapter" / "adapter.json").read_text())
    host = host_of(tuned["plain"])
    base, mine = load_models(host, [("mine", outcome.checkpoint)], default_registry(), "cpu")
    assert config["fingerprint"]["weights"] == MOSHI_HOST.fingerprint(base.model)["weights"]
    assert mine.injection is not None
    with pytest.raises(AdapterError, match="The architecture is the same"):
        load_models(
            MoshiHostConfig(hf_repo=small_moshi(), dtype="float32"), [("mine", outcome.checkpoint)],
            default_registry(), "cpu",
        )  # fmt: skip


@pytest.mark.first_by_default
@pytest.mark.parametrize("kind", ["plain", "embedded"])
def test_a_lora_is_trained_further(train, tuned, kind):
    """What is exported is a LoRA of the original base model: stock Moshi adds it to that."""
    lora = EMBEDDED if kind == "embedded" else LORA
    outcome = train(moshi_paths=paths(tuned[kind]), lora=lora, ttt=[], max_steps=1, optim=STILL)
    start = load_file(tuned[kind] / "lora.safetensors")
    end = load_file(outcome.checkpoint / "consolidated" / "lora.safetensors")
    assert start.keys() == end.keys()
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())
    assert any(tensor.any() for name, tensor in end.items() if name.endswith("lora_B.weight"))
    config = json.loads((outcome.checkpoint / "consolidated" / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["lora_scaling"]) == (True, 2, 2.0)


def test_an_adapter_that_continues_a_lora_loads_where_it_was_trained_and_on_the_base(train, tuned):
    outcome = train(moshi_paths=paths(tuned["plain"]), lora=LORA, max_steps=1)
    assert any(name.startswith("extra.") or "lora_A" in name for name in adapter(outcome.checkpoint))
    for host in (host_of(tuned["plain"]), MoshiHostConfig(hf_repo=small_moshi(), dtype="float32")):
        _, mine = load_models(host, [("mine", outcome.checkpoint)], default_registry(), "cpu")
        with mine.present():
            assert MOSHI_HOST.describe_extra(mine.model) == {"lora": {"rank": 2, "scaling": 2.0}}
        assert MOSHI_HOST.describe_extra(mine.model) == {}


@pytest.mark.exhaustive  # runs with and without a LoRA resume alike: test_resume.py
def test_a_run_on_a_lora_resumes(train, tuned, tmp_path):
    start = {"moshi_paths": paths(tuned["plain"]), "lora": LORA}
    train(**start, max_steps=2, ckpt_freq=1, num_ckpt_keep=None)
    straight = adapter(find_checkpoints(tmp_path / "run")[-1])
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    again = train(**start, max_steps=2, resume=True)
    assert all(torch.equal(tensor, straight[name]) for name, tensor in adapter(again.checkpoint).items())


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        ("plain", {**LORA, "rank": 3}, "rank 2 and scaling 2 .* asks for rank 3 and scaling 2"),
        ("plain", {**LORA, "scaling": 4.0}, "asks for rank 2 and scaling 4"),
        ("embedded", LORA, r"embeddings that were trained beside its LoRA .*lora\.ft_embed: true"),
    ],
)
def test_another_lora_than_the_one_that_is_there_raises(train, tuned, tmp_path, kind, lora, message):
    with pytest.raises(HostError, match=message):
        train(moshi_paths=paths(tuned[kind]), lora=lora)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive  # a merged folder as a base: tests/unit/hosts/test_stored_lora.py
def test_a_merged_run_is_a_base_by_local_files_alone(train, tuned, tmp_path):
    """As moshi-finetune's config has it: no repository, every file by its path; and an adapter stays with its base."""
    merged = train(lora=EMBEDDED, save_adapters=False, max_steps=1, run_dir=str(tmp_path / "merged")).checkpoint
    config = merged / "consolidated" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora": True, "lora_rank": 2, "lora_scaling": 2.0}))
    local = {
        "hf_repo_id": None, "config_path": str(config),
        "moshi_path": str(merged / "consolidated" / "consolidated.safetensors"),
        "mimi_path": str(bundle_folder() / "tokenizer-tiny-mimi.safetensors"),
        "tokenizer_path": str(bundle_folder() / "tokenizer_spm_512.model"),
    }  # fmt: skip
    again = train(moshi_paths=local, adapter=str(merged), ttt=TTT, max_steps=1, optim=STILL)
    start, end = adapter(merged), adapter(again.checkpoint)
    assert all(torch.equal(tensor, end[name]) for name, tensor in start.items())
    with pytest.raises(AdapterError, match="merged ones, in consolidated/ of the same checkpoint"):
        train(adapter=str(merged), run_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_local_files_without_a_place_raise(settings):
    with pytest.raises(ConfigError, match="neither config_path nor moshi_path says where the model is"):
        settings(moshi_paths={"hf_repo_id": None})
    made = settings(moshi_paths={"hf_repo_id": None, "moshi_path": "somewhere/model.safetensors"})
    assert (made.host.hf_repo, made.host.moshi_weights) == ("somewhere", "somewhere/model.safetensors")


def test_ft_embed_needs_a_lora(settings):
    with pytest.raises(ConfigError, match=r"set lora\.enable, or ft_embed to false"):
        settings(lora={"enable": False, "ft_embed": True})
    assert settings(lora={"enable": False, "ft_embed": True}, full_finetuning=True).run.full_finetuning
