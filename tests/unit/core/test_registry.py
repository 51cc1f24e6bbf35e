"""The programmatic face of the registry: register, unregister, override, look up."""

from __future__ import annotations

import pytest

from moshi_ttt.core.builtin import SequenceFormat
from moshi_ttt.core.errors import ConfigError, DuplicateNameError, PluginError, UnknownNameError
from moshi_ttt.core.precision import FP32, PrecisionPolicy
from moshi_ttt.core.registrar import RUNTIME
from moshi_ttt.core.registry import Registry, default_registry
from tests.unit.core.toy import AnyNameConfig, NeedsEmbeddings, ToyBlock, ToyConfig, ToyHost, toy_registry


def test_registered_names_are_found():
    registry = toy_registry()
    assert registry.names("block") == ("toy", "toy_mlp")
    assert registry.block("toy").factory is ToyBlock
    assert registry.block("toy").config_class is ToyConfig
    assert registry.block("toy").provenance == RUNTIME
    assert isinstance(registry.host("toy"), ToyHost)
    assert isinstance(registry.format_adapter("sequence"), SequenceFormat)
    assert registry.policy("fp32") is FP32


def test_entries_are_sorted_by_kind_and_name():
    keys = [(entry.kind, entry.name) for entry in toy_registry().entries()]
    assert keys == sorted(keys)


def test_strings_are_imported_when_used():
    registry = Registry()
    registry.register_block("lazy", config="tests.unit.core.toy:ToyConfig", block="tests.unit.core.toy:ToyBlock")
    assert registry.block("lazy").factory is ToyBlock


def test_unregister_forgets_a_name():
    registry = toy_registry()
    registry.unregister("block", "toy")
    assert registry.names("block") == ("toy_mlp",)
    registry.register_block("toy", config=ToyConfig, block=NeedsEmbeddings)
    assert registry.block("toy").factory is NeedsEmbeddings


def test_registries_share_nothing():
    registry = toy_registry()
    assert "toy" not in default_registry().names("block")
    assert "fp32_state" in default_registry().names("precision_policy")
    assert registry.names("block") == toy_registry().names("block")


def test_copy_can_be_added_to_alone():
    registry = toy_registry()
    copy = registry.copy()
    copy.register_block("new", config=AnyNameConfig, block=ToyBlock)
    assert copy.names("block") == ("new", "toy", "toy_mlp")
    assert registry.names("block") == ("toy", "toy_mlp")


# ---- override


def test_override_replaces_and_restores():
    registry = toy_registry()
    with registry.override("block", "toy", NeedsEmbeddings):
        assert registry.block("toy").factory is NeedsEmbeddings
        assert registry.block("toy").config_class is ToyConfig, "the config stays unless another is given"
    assert registry.block("toy").factory is ToyBlock


def test_override_nests():
    registry = toy_registry()
    first, second = PrecisionPolicy(name="fp32", state="model"), PrecisionPolicy(name="fp32", output="model")
    with registry.override("precision_policy", "fp32", first):
        with registry.override("precision_policy", "fp32", second):
            assert registry.policy("fp32") is second
        assert registry.policy("fp32") is first
    assert registry.policy("fp32") is FP32


def test_override_of_a_new_name_removes_it_afterwards():
    registry = toy_registry()
    with registry.override("block", "new", ToyBlock, config=AnyNameConfig):
        assert registry.block("new").factory is ToyBlock
    with pytest.raises(UnknownNameError):
        registry.block("new")


@pytest.mark.parametrize("name", ["toy", "new"])
def test_override_restores_when_the_body_raises(name):
    registry = toy_registry()
    with pytest.raises(ZeroDivisionError), registry.override("block", name, NeedsEmbeddings, config=AnyNameConfig):
        raise ZeroDivisionError
    assert registry.names("block") == ("toy", "toy_mlp")
    assert registry.block("toy").factory is ToyBlock


def test_override_restores_what_the_body_unregistered():
    registry = toy_registry()
    with registry.override("block", "toy", NeedsEmbeddings):
        registry.unregister("block", "toy")
    assert registry.block("toy").factory is ToyBlock


# ---- refusals


def test_register_twice_raises_and_says_what_to_do():
    with pytest.raises(DuplicateNameError, match=r"already registered.*override"):
        toy_registry().register_block("toy", config=ToyConfig, block=ToyBlock)


def test_unregister_an_unknown_name_raises():
    with pytest.raises(UnknownNameError, match="Did you mean 'toy'"):
        toy_registry().unregister("block", "toi")


@pytest.mark.parametrize("kind", ["block", "host", "precision_policy", "format_adapter"])
def test_unknown_name_lists_what_is_allowed_and_mentions_workers(kind):
    registry = toy_registry()
    with pytest.raises(UnknownNameError) as caught:
        registry.entry(kind, "does_not_exist")
    for name in registry.names(kind):
        assert name in str(caught.value)
    assert "spawned workers" in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a.b", 3, None])
def test_name_of_other_characters_raises(name):
    with pytest.raises(PluginError, match="letters, digits"):
        toy_registry().register("precision_policy", name, FP32)


@pytest.mark.parametrize(
    ("kind", "ask"),
    [("host", "host"), ("precision_policy", "policy"), ("format_adapter", "format_adapter")],
)
@pytest.mark.parametrize("target", [5, ToyHost, "tests.unit.core.toy:DIM"], ids=["object", "class", "string"])
def test_target_of_another_type_raises_when_used(kind, ask, target):
    registry = toy_registry()
    registry.register(kind, "odd", target)
    with pytest.raises(PluginError, match=f"{kind} 'odd'.*expected"):
        getattr(registry, ask)("odd")


@pytest.mark.parametrize("config", [5, dict, "tests.unit.core.toy:DIM"])
def test_config_that_is_not_a_block_config_raises_when_used(config):
    registry = toy_registry()
    registry.register_block("odd", config=config, block=ToyBlock)
    with pytest.raises(PluginError, match=r"config of variant 'odd'.*BlockConfig"):
        registry.block("odd")


@pytest.mark.parametrize("block", [5, "tests.unit.core.toy:DIM"])
def test_block_that_cannot_be_called_raises_when_used(block):
    registry = toy_registry()
    registry.register_block("odd", config=AnyNameConfig, block=block)
    with pytest.raises(PluginError, match="odd"):
        registry.block("odd")


def test_block_without_a_config_raises():
    with pytest.raises(PluginError, match="needs config="):
        toy_registry().register("block", "odd", ToyBlock)
