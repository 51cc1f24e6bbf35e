"""The config of a run: moshi-finetune's file as it is, ours beside it, every mistake named."""

from __future__ import annotations

import warnings

import pytest
import yaml

from moshi_ttt import default_registry
from moshi_ttt.configs.settings import parse_settings, read_settings, write_settings
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import BUNDLE

# Every key of moshi-finetune's example and options, with its spelling of numbers.
FINETUNE = """
data:
  eval_data: ''
  shuffle: true
  train_data: 'train.jsonl'
moshi_paths:
  hf_repo_id: "kyutai/moshiko-pytorch-bf16"
full_finetuning: false
lora:
  enable: true
  rank: 128
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 0
log_freq: 1
eval_freq: 100
do_eval: false
do_ckpt: true
ckpt_freq: 100
num_ckpt_keep: 3
num_microbatches: 1
max_norm: 1.0
param_dtype: bfloat16
overwrite_run_dir: false
save_adapters: true
run_dir: "out"
wandb:
  project: null
  run_name: ""
  key: ""
  offline: False
"""


def parse(**changes):
    base = {"data": {"train_data": "a.jsonl"}, "run_dir": "out", "lora": {"enable": True}}
    return parse_settings({**base, **changes}, registry=default_registry(), where="c.yaml")


def test_a_moshi_finetune_file_runs_unchanged(tmp_path):
    path = tmp_path / "moshi_7B.yaml"
    path.write_text(FINETUNE)
    settings = read_settings(str(path), [], default_registry())
    assert settings.host.hf_repo == "kyutai/moshiko-pytorch-bf16"
    assert settings.host.dtype == "bfloat16"
    run = settings.run
    assert (run.optim.lr, run.lora.rank, run.duration_sec, run.max_steps) == (2e-6, 128, 100.0, 2000)
    assert (run.first_codebook_weight_multiplier, run.text_padding_weight) == (100.0, 0.5)
    assert settings.ttt.ttt == ()


def test_defaults_are_moshi_finetunes():
    run = parse().run
    assert (run.batch_size, run.num_microbatches, run.max_steps, run.duration_sec) == (1, 1, 100, 10.0)
    assert (run.optim.lr, run.optim.weight_decay, run.optim.pct_start) == (1e-4, 0.1, 0.05)
    assert (run.lora.rank, run.lora.scaling, run.max_norm, run.num_ckpt_keep) == (64, 2.0, 1.0, 3)
    assert run.data.shuffle is False
    assert (run.gradient_checkpointing, run.save_adapters, run.do_ckpt, run.do_eval) == (True, True, True, False)


def test_null_is_the_default():
    run = parse(optim=None, wandb=None, moshi_paths=None, data={"train_data": "a", "eval_data": None}).run
    assert run.optim.lr == 1e-4
    assert not run.data.eval_data


def test_ours_stands_beside_it():
    settings = parse(
        ttt=[{"variant": "ttt_mlp", "layers": "last:3"}, {"variant": "gating_mlp", "layers": "0"}],
        precision="fp32_state", carry_state=True, optim={"lr": 1e-5, "lr_groups": {"ttt": 1e-3, "gates": 1e-2}},
        moshi_paths={"hf_repo_id": "a/b", "moshi_path": "m.safetensors", "tokenizer_path": "t.model"}, seed=3,
    )  # fmt: skip
    assert [entry.variant for entry in settings.ttt.ttt] == ["ttt_mlp", "gating_mlp"]
    assert settings.ttt.seed == settings.run.seed == 3
    assert settings.host.files == {"moshi_weights": "m.safetensors", "tokenizer": "t.model"}
    assert settings.run.optim.lr_groups.lora is None


def test_overrides_reach_into_lists_and_make_sections(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {train_data: a}\nrun_dir: out\nttt: [{variant: ttt_mlp, layers: 1}]\n")
    overrides = ["optim.lr=1e-5", "ttt.0.chunk=8", "lora.enable=true", "data.shuffle=false", "optim.lr_groups.ttt=0.1"]
    settings = read_settings(str(path), overrides, default_registry())
    assert settings.run.optim.lr == 1e-5
    assert settings.ttt.ttt[0].chunk == 8
    assert (settings.run.lora.enable, settings.run.data.shuffle) == (True, False)
    assert settings.run.optim.lr_groups.ttt == 0.1


def test_what_is_written_means_the_same(tmp_path):
    settings = parse(ttt=[{"variant": "ttt_mlp", "layers": "1,3"}], optim={"lr_groups": {"gates": 0.01}})
    write_settings(settings, tmp_path / "args.yaml")
    again = parse_settings(
        yaml.safe_load((tmp_path / "args.yaml").read_text()), registry=default_registry(), where="args"
    )
    assert again.ttt == settings.ttt
    assert again.run.model_dump(exclude={"moshi_paths"}) == settings.run.model_dump(exclude={"moshi_paths"})


def test_the_flat_block_sets_the_runs_options():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = parse(ttt={"layers": "1", "persistent_states": True, "gradient_checkpointing": False})
        with pytest.raises(ConfigError, match=r"False, and ttt\.persistent_states is True. They are one"):
            parse(ttt={"layers": "1", "persistent_states": True}, carry_state=False)
        with pytest.raises(ConfigError, match=r"ttt\.gradient_checkpointing is False"):
            parse(ttt={"layers": "1", "gradient_checkpointing": False}, gradient_checkpointing=True)
        assert parse(ttt={"layers": "1", "persistent_states": True}, carry_state=True).run.carry_state is True
    assert settings.run.carry_state is True
    assert settings.run.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("changes", "message"),
    {
        "misspelt": ({"batch_sise": 3}, "unknown key 'batch_sise'. Did you mean 'batch_size'"),
        "misspelt inside": ({"optim": {"learning_rate": 1}}, "unknown key 'optim.learning_rate'"),
        "no number": ({"batch_size": "many"}, "batch_size = 'many'"),
        "zero": ({"max_steps": 0}, "max_steps = 0"),
        "yes for a number": ({"batch_size": True}, "batch_size cannot be true"),
        "an unknown variant": ({"ttt": [{"variant": "ttt_mpl"}]}, "ttt_mpl"),
        "an unknown policy": ({"precision": "fp64"}, "precision"),
        "nothing to train": ({"lora": None}, "nothing to train"),
        "two ways to say which": (
            {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "moshi_paths": {"hf_repo_id": "a/b"}},
            "both say which Moshi",
        ),
        "two dtypes": (
            {"host": {"name": "moshi", "hf_repo": "a/b", "dtype": "float32"}, "param_dtype": "bfloat16"},
            "leave one out",
        ),
        "another host": ({"host": {"name": "audio"}}, "written for the host 'moshi'"),
        "full and LoRA": ({"full_finetuning": True}, "exclude each other"),
        "evaluation of nothing": ({"do_eval": True}, "data.eval_data"),
        "LoRA as a switch": ({"lora": True}, "lora cannot be true"),
        "too many workers": ({"data": {"train_data": "a", "num_workers": 1000}}, "num_workers"),
        "a dtype": ({"param_dtype": "float16"}, "param_dtype"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    assert message in str(caught.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(batch_sise=3, max_steps=-1, precision="none", ttt=[{"variant": "nope"}])
    for part in ("batch_sise", "max_steps", "precision", "nope"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "write key=value"), ("=3", "write key=value"), ("a..b=1", "write key=value"),
        ("ttt.4.chunk=1", "is a list of 1"), ("run_dir.x=1", "nothing inside"), ("optim={", "not valid YAML"),
        ("optim.rate=1", "unknown key 'optim.rate'"),
    ],
)  # fmt: skip
def test_overrides_that_mean_nothing(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text("data: {train_data: a}\nrun_dir: out\nttt: [{variant: ttt_mlp, layers: 1}]\n")
    with pytest.raises(ConfigError) as caught:
        read_settings(str(path), [override], default_registry())
    assert message in str(caught.value)


def test_what_moshi_finetune_writes_beside_its_checkpoints_is_read(tmp_path):
    """Its args.yaml has every key of its own, some of which it does not read again."""
    path = tmp_path / "args.yaml"
    values = yaml.safe_load(FINETUNE) | {"world_size": 8, "eval_freq": -1, "ckpt_freq": -1, "num_ckpt_keep": None}
    values["moshi_paths"] = {
        "hf_repo_id": "kyutai/moshiko-pytorch-bf16", "mimi_path": None, "moshi_path": None, "tokenizer_path": None,
        "config_path": None,
    }  # fmt: skip
    values["wandb"] = {"project": None, "offline": False, "key": None, "run_name": None}
    path.write_bytes(yaml.safe_dump(values).replace("\n", "\r\n").encode("utf-8-sig"))
    run = read_settings(str(path), [], default_registry()).run
    assert (run.eval_freq, run.ckpt_freq, run.num_ckpt_keep) == (-1, -1, None)
    path.write_bytes(yaml.safe_dump(values).encode("utf-16"))
    assert read_settings(str(path), [], default_registry()).run == run


def test_without_a_repository_every_file_is_named(tmp_path):
    files = {name: str(tmp_path / name) for name in ("moshi_path", "mimi_path", "tokenizer_path", "config_path")}
    host = parse(moshi_paths={"hf_repo_id": None, **files}).host
    assert set(host.files.values()) == set(files.values())
    ours = {"moshi_path": "model", "mimi_path": "tokenizer-tiny-mimi", "config_path": "config"}
    tiny = {name: str(next(BUNDLE.glob(f"{stem}.*"))) for name, stem in ours.items()}
    tiny["tokenizer_path"] = str(next(BUNDLE.glob("*.model")))
    host = parse(moshi_paths={"hf_repo_id": None, **tiny}).host
    assert host.bundle().tokenizer().get_piece_size() == 512
    assert MOSHI_HOST.skeleton(host).dep_q == 8
    del files["moshi_path"], files["config_path"]
    with pytest.raises(ConfigError, match="hf_repo_id is null, and neither config_path nor moshi_path says where") as e:
        parse(moshi_paths={"hf_repo_id": None, **files})
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "side"), [("left", "left"), ("right", "right"), (0, "left"), (1, "right"), ("1", "right")]
)
def test_moshis_channel_by_name_or_number(value, side):
    data = {"train_data": "a", "moshi_channel": value, "speaker_label": "SPEAKER_00"}
    settings = parse(data=data)
    assert (settings.run.data.moshi_channel, settings.run.data.speaker_label) == (side, "SPEAKER_00")


@pytest.mark.parametrize("value", ["middle", 2, -1, True, None, 1.0])
def test_another_channel_raises(value):
    with pytest.raises(ConfigError, match="moshi_channel"):
        parse(data={"train_data": "a", "moshi_channel": value})


def test_a_config_without_recordings_says_what_a_training_needs():
    with pytest.raises(
        ConfigError, match=r"'data' is required(.|\n)*Add `data: \{train_data: \.\.\.\}` and `run_dir: \.\.\.`"
    ):
        read_settings("tiny-ttt-mlp", [])


def test_the_earlier_section_of_quickstart_is_named():
    values = {"train": {"steps": 3}, "data": {"train_data": "x"}, "run_dir": "y", "ttt": [{"variant": "ttt_mlp"}]}
    with pytest.raises(ConfigError, match=r"the section 'train' is of an earlier version.*quickstart --config"):
        parse_settings(values)
