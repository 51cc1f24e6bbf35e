"""Loading from a folder laid out like a hub repository, and the ways it can fail. No hub is reached."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from moshi_ttt.core.errors import ConfigError, HostError
from moshi_ttt.hosts.moshi import loading, tiny
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.upstream import LMModel, loaders

MIMI = {
    **loaders._mimi_config,
    "seanet": {**loaders._seanet_kwargs, "dimension": 16, "n_filters": 4},
    "quantizer": {
        **loaders._quantizer_kwargs,
        "dimension": 8,
        "n_q": 8,
        "bins": 32,
        "input_dimension": 16,
        "output_dimension": 16,
    },
    "transformer": {
        **loaders._transformer_kwargs,
        "d_model": 16,
        "num_heads": 2,
        "num_layers": 1,
        "dim_feedforward": 32,
        "input_dimension": 16,
        "output_dimensions": [16],
    },
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A folder with everything a hub repository of Moshi has."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moshi"
    folder.mkdir()
    save_file(tiny.random_tiny_lm(dtype=torch.bfloat16, seed=3).state_dict(), folder / "model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mimi = loaders.get_mimi(None, MIMI, num_codebooks=8)
    save_file({name: t.contiguous() for name, t in mimi.state_dict().items()}, folder / "tokenizer-mimi.safetensors")
    (folder / "text.txt").write_text("to hear a short demonstration press one now\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=48, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    names = {"mimi_name": "tokenizer-mimi.safetensors", "tokenizer_name": "spm.model", "mimi_config_name": "mimi.json"}
    (folder / "config.json").write_text(json.dumps({**tiny.RANDOM_TINY_CONFIG, "model_type": "moshi", **names}))
    (folder / "mimi.json").write_text(json.dumps(MIMI))
    return folder


def copied(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "copy"))


def edited(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_folder_loads_bit_equal(repository):
    model = MOSHI_HOST.load(MoshiHostConfig(hf_repo=str(repository)))
    source = tiny.random_tiny_lm(dtype=torch.bfloat16, seed=3)
    assert isinstance(model, LMModel)
    assert not model.training
    assert model.state_dict().keys() == source.state_dict().keys()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_dtype_argument_wins_over_config_over_stored(repository):
    def dtype(config=None, argument=None):
        return MOSHI_HOST.load(MoshiHostConfig(hf_repo=str(repository), dtype=config), dtype=argument).dtype

    assert dtype() == torch.bfloat16
    assert dtype("float32") == torch.float32
    assert dtype("float32", torch.bfloat16) == torch.bfloat16


def test_stored_dtype_is_read_from_the_file(repository, tmp_path):
    folder = copied(repository, tmp_path)
    save_file(tiny.random_tiny_lm().state_dict(), folder / "model.safetensors")
    assert resolve_repo(str(folder)).load_lm().dtype == torch.float32


def test_codec_and_tokenizer_come_with_it(repository):
    bundle = resolve_repo(str(repository))
    mimi = bundle.load_mimi()
    with torch.no_grad():
        codes = mimi.encode(torch.zeros(1, 1, 1920 * 2))
    assert codes.shape == (1, 8, 2)
    tokenizer = bundle.tokenizer()
    assert tokenizer.decode(tokenizer.encode("press one")) == "press one"


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer-mimi.safetensors", "spm.model", "mimi.json"])
def test_a_missing_file_is_named(repository, tmp_path, missing):
    folder = copied(repository, tmp_path)
    (folder / missing).unlink()
    with pytest.raises(HostError, match=missing):
        resolve_repo(str(folder))


def test_all_missing_files_are_named(repository, tmp_path):
    shutil.copy(repository / "config.json", tmp_path / "config.json")
    with pytest.raises(HostError, match=r"mimi\.json, model\.safetensors, spm\.model, tokenizer-mimi\.safetensors"):
        resolve_repo(str(tmp_path))


def test_a_folder_without_a_config_raises(tmp_path):
    with pytest.raises(HostError, match=r"no config\.json"):
        resolve_repo(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"dim": 64}'])
def test_a_config_of_something_else_raises(repository, tmp_path, text):
    folder = copied(repository, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(HostError, match=r"config\.json"):
        resolve_repo(str(folder))


def test_unknown_options_and_wrong_weights_raise(repository, tmp_path):
    folder = edited(copied(repository, tmp_path), no_such_option=1)
    with pytest.raises(HostError, match=r"model\.safetensors.*no_such_option"):
        resolve_repo(str(folder)).load_lm()
    folder = edited(Path(shutil.copytree(repository, tmp_path / "other")), dim=32)
    with pytest.raises(HostError, match="size mismatch"):
        resolve_repo(str(folder)).load_lm()


def test_truncated_weights_raise(repository, tmp_path):
    folder = copied(repository, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(HostError, match=r"cannot load .*model\.safetensors"):
        resolve_repo(str(folder)).load_lm()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "justaname", "a/b/c"])
def test_neither_folder_nor_repository_raises(name):
    with pytest.raises(HostError, match="neither an existing folder nor a repository"):
        resolve_repo(name)


def test_other_builtins_and_revisions_of_folders_raise(repository):
    with pytest.raises(HostError, match="builtin:tiny"):
        resolve_repo("builtin:huge")
    with pytest.raises(HostError, match="no revisions"):
        resolve_repo(str(repository), revision="main")


def test_a_hub_failure_says_what_was_tried(monkeypatch):
    def unreachable(name, revision=None):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(loading.CheckpointInfo, "from_hf_repo", staticmethod(unreachable))
    with pytest.raises(HostError, match=r"'owner/name' at revision 'v1' .*no network"):
        resolve_repo("owner/name", revision="v1")


def test_a_hub_name_and_revision_are_passed_on(monkeypatch):
    seen, info = {}, loading.CheckpointInfo(Path("m"), Path("c"), Path("t"))
    monkeypatch.setattr(
        loading.CheckpointInfo,
        "from_hf_repo",
        staticmethod(lambda name, revision=None: seen.update(name=name, revision=revision) or info),
    )
    assert resolve_repo("owner/name", revision="v1").info == info
    assert seen == {"name": "owner/name", "revision": "v1"}


def test_the_builtin_model(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "BUNDLE", tmp_path)
    monkeypatch.setattr(tiny, "BUNDLE", tmp_path)
    for call in (lambda: resolve_repo("builtin:tiny"), tiny.bundle_folder, tiny.tiny_config, tiny.speech_files):
        with pytest.raises(HostError, match=r"no tiny Moshi.*build_tiny_bundle"):
            call()


def test_the_builtin_model_loads_and_hears_its_speech():
    bundle = resolve_repo("builtin:tiny")
    model = MOSHI_HOST.load(MoshiHostConfig(hf_repo="builtin:tiny"))
    assert model.dtype == torch.bfloat16
    assert tiny.tiny_config()["dim"] == model.dim
    assert tiny.speech_files()
    with torch.no_grad():
        codes = bundle.load_mimi().encode(torch.zeros(1, 1, 1920 * 3))
    assert codes.shape == (1, 8, 3)
    assert bundle.tokenizer().encode("press one")


def test_a_config_says_which_model_it_is():
    assert MoshiHostConfig(hf_repo="a/b").described == "a/b"
    named = MoshiHostConfig(hf_repo="a/b", revision="v1", config_path="c.json", moshi_weights="w.safetensors")
    assert named.described == "a/b, revision v1, moshi_weights w.safetensors, config_path c.json"


def test_config_is_frozen_and_closed():
    with pytest.raises(ConfigError):
        MoshiHostConfig(hf_repo="a/b", dtype="float16")
    with pytest.raises(ConfigError):
        MoshiHostConfig(hf_repo="a/b", repo="c")
    with pytest.raises(ConfigError):
        MoshiHostConfig()


def test_random_tiny_lm_leaves_the_generator_alone_and_is_seeded():
    before = torch.random.get_rng_state()
    a, b, c = tiny.random_tiny_lm(seed=1), tiny.random_tiny_lm(seed=1), tiny.random_tiny_lm(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.text_emb.weight, b.text_emb.weight)
    assert not torch.equal(a.text_emb.weight, c.text_emb.weight)


@pytest.mark.exhaustive  # that `--help` imports nothing heavy is tested by default
def test_registering_the_host_imports_neither_moshi_nor_torch():
    code = (
        "import sys, moshi_ttt.hosts.moshi as host\n"
        "class R:\n"
        "    def add(self, name, target): print(name, target)\n"
        "host.moshi_ttt_hosts(R())\n"
        "print(sorted({'moshi', 'torch'} & set(sys.modules)))\n"
        "print(host.MOSHI_HOST.name, all(hasattr(host, name) for name in host.__all__))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["moshi moshi_ttt.hosts.moshi.host:MOSHI_HOST", "[]", "moshi True"]


def test_skeleton_reads_no_weights(repository, tmp_path):
    shutil.copy(repository / "config.json", tmp_path / "config.json")
    for folder, dtype in (tmp_path, torch.bfloat16), (repository, torch.bfloat16):
        model = MOSHI_HOST.skeleton(MoshiHostConfig(hf_repo=str(folder)))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert model.dtype == dtype
        assert {name: t.shape for name, t in model.state_dict().items()} == {
            name: t.shape for name, t in tiny.random_tiny_lm(seed=3).state_dict().items()
        }
    assert MOSHI_HOST.skeleton(MoshiHostConfig(hf_repo=str(tmp_path), dtype="float32")).dtype == torch.float32


def test_skeleton_of_something_else_raises(repository, tmp_path):
    with pytest.raises(HostError, match=r"no config\.json"):
        MOSHI_HOST.skeleton(MoshiHostConfig(hf_repo=str(tmp_path)))
    folder = edited(copied(repository, tmp_path), no_such_option=1)
    with pytest.raises(HostError, match="no_such_option"):
        MOSHI_HOST.skeleton(MoshiHostConfig(hf_repo=str(folder)))
