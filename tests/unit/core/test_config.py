"""Configurations: what is accepted, and what every mistake is told."""

from __future__ import annotations

import pytest

from moshi_ttt.core.config import FrozenConfig
from moshi_ttt.core.config_parsing import load_config, parse_config, read_mapping
from moshi_ttt.core.errors import ConfigError, PluginError
from tests.unit.core.toy import AnyNameConfig, Gate, ToyBlock, ToyConfig, toy_registry


class TrainConfig(FrozenConfig):
    steps: int = 10
    optimizer: Gate = Gate()


def values(**changes: object) -> dict[str, object]:
    return {"host": {"name": "toy"}, "ttt": [{"variant": "toy", "layers": "last:2"}]} | changes


def parse(**changes: object):
    return parse_config(values(**changes), registry=toy_registry(), sections={"train": TrainConfig})


def test_defaults():
    config = parse()
    assert (config.precision, config.seed, config.ttt[0].layers) == ("fp32_state", 0, "last:2")
    assert config.extra == {"train": TrainConfig()}


def test_entries_have_the_type_of_their_variant():
    config = parse(ttt=[{"variant": "toy", "layers": [1, -1], "rate": 0.25, "gate": {"init": 0.0}}])
    entry = config.ttt[0]
    assert isinstance(entry, ToyConfig)
    assert (entry.rate, entry.gate.init, entry.layers) == (0.25, 0.0, (1, -1))


def test_no_blocks_is_a_configuration():
    assert parse(ttt=[]).ttt == ()


def test_sections_are_validated_by_the_application():
    assert parse(train={"steps": 3}).extra["train"] == TrainConfig(steps=3)


def test_every_option_survives_a_dump():
    config = parse(
        ttt=[{"variant": "toy", "rate": 0.25, "gate": {"init": 0.5}}],
        train={"steps": 3},
        host={"name": "toy", "width": 8},
    )
    again = config.model_dump(mode="json")
    assert again["ttt"][0]["rate"] == 0.25
    assert again["ttt"][0]["gate"] == {"init": 0.5}
    assert again["host"]["width"] == 8
    assert again["extra"]["train"]["steps"] == 3


@pytest.mark.parametrize("path", ["seed", "ttt.0.rate", "ttt.0.gate.init", "host.name", "extra.train.steps"])
def test_frozen(path):
    target: object = parse()
    *head, last = path.split(".")
    for part in head:
        if isinstance(target, tuple):
            target = target[int(part)]
        elif isinstance(target, dict):
            target = target[part]
        else:
            target = getattr(target, part)
    with pytest.raises(ConfigError, match=f"{last} cannot be set to 1: a configuration does not change"):
        setattr(target, last, 1)


def test_load_config_reads_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("host: {name: toy}\nprecision: uniform\nttt:\n  - {variant: toy, layers: '0', rate: 1.5}\n")
    config = load_config(path, registry=toy_registry())
    assert (config.precision, config.ttt[0].rate) == ("uniform", 1.5)


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt": [{"variant": "toi"}]}, r"ttt\[0\]: Unknown block 'toi'. Did you mean 'toy'"),
        ({"host": {"name": "tory"}}, "host.*Unknown host 'tory'. Did you mean 'toy'"),
        ({"precision": "fp32state"}, "precision: Unknown precision_policy 'fp32state'. Did you mean 'fp32_state'"),
        ({"precison": "fp32"}, "unknown key 'precison'. Did you mean 'precision'"),
        ({"trian": {}}, "unknown key 'trian'. Did you mean 'train'"),
        ({"ttt": [{"variant": "toy", "rates": 1}]}, r"ttt\[0\] \(toy\): unknown key 'rates'. Did you mean 'rate'"),
        ({"ttt": [{"variant": "toy", "gate": {"inti": 1}}]}, "unknown key 'gate.inti'. Did you mean 'init'"),
        ({"ttt": [{"variant": "toy", "fallback": {"inti": 1}}]}, "unknown key 'fallback.inti'. Did you mean 'init'"),
        ({"host": {"name": "toy", "with": 3}}, "host: unknown key 'with'. Did you mean 'width'"),
        ({"train": {"step": 3}}, "train: unknown key 'step'. Did you mean 'steps'"),
        ({"train": {"optimizer": {"int": 3}}}, "train: unknown key 'optimizer.int'. Did you mean 'init'"),
        ({"ttt": [{"variant": "toy", "rate": "fast"}]}, r"ttt\[0\] \(toy\): rate = 'fast': "),
        ({"ttt": [{"variant": "toy", "gate": 3}]}, r"ttt\[0\] \(toy\): gate = 3: "),
        ({"train": {"steps": "many"}}, "train: steps = 'many': "),
        ({"seed": "lucky"}, "seed = 'lucky': "),
        ({"precision": ["fp32"]}, "precision"),
    ],
)
def test_mistake_is_named_with_the_nearest_that_is_allowed(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"ttt": None},
        {"ttt": "toy"},
        {"ttt": {"variant": "toy"}},
        {"ttt": ["toy"]},
        {"ttt": [None]},
        {"ttt": [{"layers": "all"}]},
        {"ttt": [{"variant": 3}]},
        {"host": None},
        {"host": "toy"},
        {"host": {}},
        {"host": {"name": 3}},
        {"train": 5},
        {"train": "fast"},
        {"train": []},
        {3: 4},
    ],
    ids=repr,
)
def test_wrong_form_is_a_config_error(changes):
    with pytest.raises(ConfigError):
        parse_config(values() | changes, registry=toy_registry(), sections={"train": TrainConfig})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(
            host={"name": "toy", "depth": 1},
            precision="half",
            seed="lucky",
            ttt=[{"variant": "toi"}, {"variant": "toy", "rate": "fast", "speed": 2}],
            train={"step": 1},
            trian={},
        )
    lines = str(caught.value).splitlines()
    for fact in ("'depth'", "'half'", "'lucky'", "'toi'", "'fast'", "'speed'", "'step'", "'trian'"):
        assert any(fact in line for line in lines), f"{fact} is not reported in:\n{caught.value}"
    assert all(line.startswith("config: ") for line in lines)


def test_variant_whose_plugin_is_broken_raises_what_is_wrong_with_it():
    registry = toy_registry()
    registry.register_block("odd", config=AnyNameConfig, block="a_library_that_is_not_there:Block")
    with pytest.raises(PluginError, match="a_library_that_is_not_there"):
        parse_config(values(ttt=[{"variant": "odd"}]), registry=registry)


def test_section_that_nobody_asked_for_is_an_unknown_key():
    with pytest.raises(ConfigError, match="unknown key 'train'"):
        parse_config(values(train={}), registry=toy_registry())


def test_missing_file_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the config .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml", registry=toy_registry())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"host: {name: toy", "not valid YAML"),
        (b"host: [\xff\xfe", "Cannot read the config"),
        (b"", "expected a mapping"),
        (b"- toy", "expected a mapping with 'host' and 'ttt', got list"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"host: {name: toy}\nttt: []\nttt: [{variant: toy}]\n", "ttt"),
    ],
    ids=["syntax", "encoding", "empty", "list", "code", "key twice"],
)
def test_file_that_is_no_config_raises(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, registry=toy_registry())
    assert "bad.yaml" in str(caught.value)


def test_folder_for_a_file_raises(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read"):
        load_config(tmp_path, registry=toy_registry())


def test_config_of_one_variant_is_refused_by_another():
    registry = toy_registry()
    registry.register_block("plain", config=AnyNameConfig, block=ToyBlock)
    with pytest.raises(ConfigError, match="rates"):
        parse_config(values(ttt=[{"variant": "plain", "rates": 1}]), registry=registry)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_another_program_is_read(tmp_path, encoding):
    path = tmp_path / "c.yaml"
    path.write_bytes("name: ä\r\nlist:\r\n  - 1\r\n".encode(encoding))
    assert read_mapping(path) == {"name": "ä", "list": [1]}


@pytest.mark.parametrize(("contents", "said"), [(b"a: \xff", "UTF-16"), (b"day: 2024-13-45", "month must be in 1..12")])
def test_a_file_that_is_no_text_or_no_date_says_so(tmp_path, contents, said):
    path = tmp_path / "c.yaml"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match="Cannot read the config") as error:
        read_mapping(path)
    assert said in str(error.value)
