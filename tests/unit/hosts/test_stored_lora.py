"""A LoRA that comes with a model: merged, left out, trained further; and the files that do not belong together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.base_weights import base_state_dict, lora_factors
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import load_skeleton, resolve_repo
from moshi_ttt.hosts.moshi.tiny import RANDOM_TINY_CONFIG, bundle_folder, random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import loaders

RANK, SCALING = 2, 3.0


def with_lora():
    """A small Moshi with a LoRA that changes something."""
    model = random_tiny_lm(dim=32)
    lora.add_lora(model, rank=RANK, scaling=SCALING)
    lora.initialize_lora(model, 0)
    generator = torch.Generator().manual_seed(1)
    for name, factor in lora_factors(model).items():
        if name.endswith("lora_B.weight"):
            factor.data.normal_(0, 0.1, generator=generator)
    return model


def codes() -> torch.Tensor:
    return torch.randint(0, 32, (1, 17, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def repository(tmp_path) -> Path:
    """The base model as a hub repository, with its LoRA in a folder as moshi-finetune writes it."""
    folder = tmp_path / "base"
    (folder / "run").mkdir(parents=True)
    model = with_lora()
    save_file({name: tensor.clone() for name, tensor in base_state_dict(model).items()}, folder / "model.safetensors")
    save_file({name: factor.detach() for name, factor in lora_factors(model).items()}, folder / "run/lora.safetensors")
    for name in ("tokenizer-tiny-mimi.safetensors", "mimi_config.json", "tokenizer_spm_512.model"):
        shutil.copy(bundle_folder() / name, folder / name)
    config = {
        **RANDOM_TINY_CONFIG, "dim": 32, "mimi_name": "tokenizer-tiny-mimi.safetensors",
        "mimi_config_name": "mimi_config.json", "tokenizer_name": "tokenizer_spm_512.model",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    fine_tuned = {**config, "lora": True, "lora_rank": RANK, "lora_scaling": SCALING}
    (folder / "run" / "config.json").write_text(json.dumps(fine_tuned))
    return folder


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a file of which tensors may still be mapped."""
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def host(folder: Path, **paths: Path) -> MoshiHostConfig:
    return MoshiHostConfig(hf_repo=str(folder), **{name: str(path) for name, path in paths.items()})


def named_in_config(folder: Path) -> MoshiHostConfig:
    shutil.move(folder / "run" / "lora.safetensors", folder / "mine.safetensors")
    shutil.move(folder / "run" / "config.json", folder / "config.json")
    edit(folder / "config.json", lora_name="mine.safetensors")
    return host(folder)


@pytest.mark.parametrize("named", [True, False], ids=["lora_name", "beside the config"])
def test_a_lora_is_merged_or_left_out(repository, named):
    config = named_in_config(repository) if named else host(repository, config_path=repository / "run/config.json")
    model, base = with_lora(), random_tiny_lm(dim=32)
    merged = MOSHI_HOST.load(config)
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        for have, want, tolerance in ((merged, model, 1e-5), (MOSHI_HOST.load(config, lora=False), base, 0.0)):
            torch.testing.assert_close(
                have(codes()).logits, want(codes()).logits, rtol=0, atol=tolerance, equal_nan=True
            )
    assert MOSHI_HOST.fingerprint(merged)["weights"] != MOSHI_HOST.fingerprint(base)["weights"]
    assert (
        load_skeleton(str(repository), config_path=config.config_path).state_dict().keys() == base.state_dict().keys()
    )


def test_the_same_digest_in_either_dtype(repository):
    """Merged in the dtype of the file, so that it does not matter in which dtype the model computes."""
    weights = load_file(repository / "model.safetensors")
    rewrite(repository / "model.safetensors", {name: tensor.bfloat16() for name, tensor in weights.items()})
    config = host(repository, config_path=repository / "run/config.json")
    digests = {
        MOSHI_HOST.fingerprint(MOSHI_HOST.load(config, dtype=d))["weights"] for d in (torch.float32, torch.bfloat16)
    }
    assert len(digests) == 1


def test_weights_by_older_names_take_the_lora_too(repository):
    """Moshi's published weights call the attention's projections otherwise, and so may the LoRA."""
    config = host(repository, config_path=repository / "run/config.json")
    want = MOSHI_HOST.load(config).state_dict()
    for path in (repository / "model.safetensors", repository / "run" / "lora.safetensors"):
        older = {
            re.sub(r"^(transformer\..*\.self_attn\.(?:in|out)_proj)s\.0\.", r"\1.", name): tensor
            for name, tensor in load_file(path).items()
        }
        assert any(".in_proj." in name for name in older)
        rewrite(path, older)
    have = MOSHI_HOST.load(config).state_dict()
    assert all(torch.equal(tensor, have[name]) for name, tensor in want.items())


def test_weights_for_training_are_those_that_moshi_loads(repository):
    """Moshi changes a row of a Hibiki's text embedding: an adapter must find the same weights wherever it is loaded."""
    edit(repository / "config.json", model_type="hibiki")
    bundle = resolve_repo(str(repository))
    loaded = bundle.load_lm()
    weights = bundle.base_weights(loaded)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.text_emb.weight[2], loaded.text_emb.weight[3])


def test_embeddings_trained_beside_the_lora_take_the_place_of_the_models(repository):
    path = repository / "run" / "lora.safetensors"
    rewrite(path, load_file(path) | {"text_emb.weight": torch.ones(49, 32)})
    model = MOSHI_HOST.load(host(repository, config_path=repository / "run/config.json"))
    assert torch.equal(model.text_emb.weight, torch.ones(49, 32))


def test_filling_a_lora_is_strict(repository):
    stored = resolve_repo(str(repository), files={"config_path": str(repository / "run/config.json")}).lora
    model = random_tiny_lm(dim=32)
    lora.add_lora(model, rank=RANK, scaling=SCALING)
    stored.fill(model)
    want = lora_factors(with_lora())
    assert all(torch.equal(factor, want[name]) for name, factor in lora_factors(model).items())
    other = random_tiny_lm(dim=32, num_layers=4)
    lora.add_lora(other, rank=RANK, scaling=SCALING)
    with pytest.raises(HostError, match=r"not this model's: missing transformer\.layers\.3"):
        stored.fill(other)


def test_a_merged_folder_of_moshi_finetune_is_a_base(repository):
    """Its config.json says ``lora: true`` although the weights beside it are merged."""
    merged = MOSHI_HOST.load(host(repository, config_path=repository / "run/config.json")).state_dict()
    folder = repository / "run"
    (folder / "lora.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, folder / "consolidated.safetensors")
    codec = repository / "tokenizer-tiny-mimi.safetensors"
    own = {"mimi_weights": codec, "tokenizer": repository / "tokenizer_spm_512.model"}
    given = {"config_path": folder / "config.json", "moshi_weights": folder / "consolidated.safetensors"}
    for config in (host(folder, **own), host(repository, **given), host(folder, **own, **given)):
        loaded = MOSHI_HOST.load(config)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in merged.items())
    with pytest.raises(HostError, match=r"incomplete: .*tokenizer_spm_512\.model missing.*moshi_paths\.moshi_path"):
        resolve_repo(str(folder))


def test_a_merged_config_leaves_no_lora_in_what_is_exported(repository):
    raw = resolve_repo(str(repository), files={"config_path": str(repository / "run/config.json")}).info.raw_config
    assert raw["dim"] == 32
    assert not {"lora", "lora_rank", "lora_scaling", "lora_name"} & raw.keys()


def test_stock_moshi_loads_what_is_left_of_the_config(repository):
    info = resolve_repo(str(repository), files={"config_path": str(repository / "run/config.json")}).info
    assert isinstance(info.get_moshi(dtype=torch.float32), loaders.LMModel)


def refuse(repository: Path, message: str, **paths: Path) -> None:
    with pytest.raises(HostError, match=message):
        MOSHI_HOST.load(host(repository, **({"config_path": repository / "run/config.json"} | paths)))


def test_a_lora_that_is_nowhere_raises(repository):
    (repository / "run" / "lora.safetensors").unlink()
    refuse(repository, r"says that the model has a LoRA, and there is none")


def test_another_rank_raises(repository):
    edit(repository / "run" / "config.json", lora_rank=RANK + 1)
    refuse(repository, f"a LoRA of rank {RANK}, and the config.json that belongs to it says lora_rank {RANK + 1}")


def test_a_file_without_a_lora_raises(repository):
    shutil.copy(repository / "model.safetensors", repository / "run" / "lora.safetensors")
    refuse(repository, "holds no LoRA")


def test_half_a_factor_raises(repository):
    path = repository / "run" / "lora.safetensors"
    tensors = load_file(path)
    del tensors["text_linear.lora_B.weight"]
    rewrite(path, tensors)
    refuse(repository, r"has text_linear\.lora_A\.weight and no text_linear\.lora_B\.weight")


def test_a_lora_of_another_model_raises(repository):
    path = repository / "run" / "lora.safetensors"
    tensors = load_file(path)
    tensors["text_linear.lora_B.weight"] = torch.zeros(50, RANK)
    rewrite(path, tensors)
    refuse(repository, r"not this model's: text_linear\.weight is for a weight of shape \(50, 32\)")


def test_a_lora_given_as_the_weights_raises(repository):
    refuse(
        repository, "holds a LoRA, and not the weights of a model", moshi_weights=repository / "run/lora.safetensors"
    )


def test_a_config_that_contradicts_itself_raises(repository):
    named_in_config(repository)
    edit(repository / "config.json", lora=False)
    with pytest.raises(HostError, match=r"names the LoRA .*mine\.safetensors, and says lora: false"):
        resolve_repo(str(repository))


def test_a_damaged_lora_raises(repository):
    (repository / "run" / "lora.safetensors").write_bytes(b"no")
    refuse(repository, "cannot be read as safetensors")
