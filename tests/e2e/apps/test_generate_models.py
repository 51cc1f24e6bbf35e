"""``moshi-ttt generate`` with a LoRA: in an adapter, with its model, and merged into the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moshi_ttt import default_registry, inject, parse_config, save_adapter
from moshi_ttt.data.audio import read_audio
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.base_weights import base_state_dict, lora_factors
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import MERGED_NAME
from moshi_ttt.hosts.moshi.tiny import bundle_folder, speech_files
from tests.unit.data.conftest import FRAME, RATE, write_audio

RANK, SCALING = 2, 2.0
TINY = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}


@pytest.fixture
def fine_tuned(tmp_path) -> dict[str, tuple[str, ...]]:
    """The options for one fine-tuned model in three forms, and for its base model."""
    config = parse_config({"host": TINY, "ttt": []}, registry=default_registry())
    model = MOSHI_HOST.load(config.host)
    lora.add_lora(model, rank=RANK, scaling=SCALING)
    lora.initialize_lora(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, factor in lora_factors(model).items():
        if name.endswith("lora_B.weight"):
            factor.data.normal_(0, 0.3, generator=generator)
    adapter = save_adapter(inject(model, config), tmp_path / "adapter")
    with_lora, merged = (copy_of_the_tiny_moshi(tmp_path / name) for name in ("with_lora", "merged"))
    factors = {name: factor.detach() for name, factor in lora_factors(model).items()}
    save_file(factors, with_lora / "lora.safetensors")
    changed = json.loads((with_lora / "config.json").read_text())
    changed |= {"lora": True, "lora_rank": RANK, "lora_scaling": SCALING}
    (with_lora / "config.json").write_text(json.dumps(changed))
    whole = base_state_dict(MOSHI_HOST.load(MoshiHostConfig(hf_repo=str(with_lora))))
    (merged / "model.safetensors").unlink()
    save_file({name: tensor.clone() for name, tensor in whole.items()}, merged / MERGED_NAME)
    return {
        "base": ("-c", "train-cpu", "-a", "none"),
        "adapter": ("-c", "train-cpu", "-a", str(adapter)),
        "with its model": ("-c", config_of(tmp_path / "with_lora.yaml", with_lora)),
        "merged": ("-c", config_of(tmp_path / "merged.yaml", merged)),
    }


def copy_of_the_tiny_moshi(folder: Path) -> Path:
    folder.mkdir()
    for path in bundle_folder().iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".safetensors"):
            shutil.copy(path, folder / path.name)
    return folder


def config_of(path: Path, repository: Path) -> str:
    path.write_text(json.dumps({"host": {**TINY, "hf_repo": str(repository)}, "ttt": []}))
    return str(path)


@pytest.mark.exhaustive  # weights of every form: tests/unit/hosts/test_stored_lora.py
def test_a_lora_answers_the_same_in_every_form(cli, fine_tuned, tmp_path):
    samples = read_audio(speech_files()[0], RATE).numpy()[None, : 8 * FRAME]
    talk = write_audio(tmp_path / "talk.wav", samples)
    answers = {}
    for form, options in fine_tuned.items():
        out = tmp_path / f"out {form}"
        result = cli("generate", talk, "-o", out, *options)
        assert result.exit_code == 0, result.said
        answers[form] = (out / "talk.wav").read_bytes()
    assert answers["adapter"] == answers["with its model"] == answers["merged"] != answers["base"]
