"""Names that two distributions share: each is found as ``distribution:name``, in configs, plans and adapters."""

from __future__ import annotations

import json

import pytest

from moshi_ttt.core.adapter import fill_from_adapter, load_adapter, save_adapter
from moshi_ttt.core.config import BlockConfig, HostConfig
from moshi_ttt.core.config_parsing import parse_block, parse_config, parse_host
from moshi_ttt.core.errors import AdapterError, ConfigError, DuplicateNameError, UnknownNameError
from moshi_ttt.core.injection import inject
from moshi_ttt.core.registry import Registry
from tests.unit.core.toy import ToyBlock, ToyHost, ToyModel, toy_registry

HOOK = "@hookimpl\ndef moshi_ttt_{hook}(registrar):\n    registrar.add('shared', {target})\n"
BLOCK = "config='tests.unit.core.toy:AnyNameConfig', block='tests.unit.core.toy:{block}'"


def shared_block(block: str) -> str:
    return HOOK.format(hook="blocks", target=BLOCK.format(block=block))


@pytest.fixture
def registry(site_folder) -> Registry:
    """Two distributions with a variant and a host called ``shared``, and the toys' policies and formats."""
    host = HOOK.format(hook="hosts", target="'tests.unit.core.test_qualified_names:HOST'")
    site_folder.install("acme-ttt", {"acme": shared_block("ToyBlock") + host}, version="1.1")
    site_folder.install("best-ttt", {"best": shared_block("NeedsEmbeddings") + host}, version="2.2")
    found = Registry()
    with pytest.warns(UserWarning, match="claimed by acme-ttt"):
        found.discover(site_folder.entry_points())
    for entry in toy_registry().entries():
        found.register(entry.kind, entry.name, entry.target, config=entry.config)
    return found


class SharedHost(ToyHost):
    config_class = HostConfig


HOST = SharedHost()


def test_a_qualified_name_is_of_its_distribution(registry):
    first, second = (registry.block(f"{name}:shared") for name in ("acme-ttt", "best-ttt"))
    assert (first.provenance.distribution, second.provenance.distribution) == ("acme-ttt", "best-ttt")
    assert first.name == second.name == "shared"
    assert first.factory is not second.factory
    assert registry.block("Best_TTT:shared").factory is second.factory, "names of distributions compare as pip does"
    assert registry.copy().block("best-ttt:shared").factory is second.factory


def test_an_ambiguous_name_says_how_to_qualify_it(registry):
    with pytest.raises(DuplicateNameError, match=r"say whose you mean, as in acme-ttt:shared"):
        registry.block("shared")


def test_a_name_that_one_distribution_has_may_be_qualified_too(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("alone")})
    registry = Registry()
    registry.discover(site_folder.entry_points())
    assert registry.block("acme-ttt:alone").factory is registry.block("alone").factory
    with pytest.raises(UnknownNameError, match=r"'best:alone': 'alone' is registered by acme-ttt 1\.0"):
        registry.block("best:alone")
    with pytest.raises(UnknownNameError, match="Did you mean 'alone'"):
        registry.block("acme-ttt:alon")


def test_builtin_means_this_distribution(site_folder, blocks):
    site_folder.install("moshi-ttt", {"toys": blocks("shared")})
    site_folder.install("acme-ttt", {"acme": blocks("shared")})
    registry = Registry()
    with pytest.warns(UserWarning, match="claimed"):
        registry.discover(site_folder.entry_points())
    assert registry.block("builtin:shared").provenance.distribution == "moshi-ttt"


@pytest.mark.parametrize(
    ("distribution", "plugin", "message"),
    [
        ("acme-ttt", "builtin", "'builtin' of a plugin is reserved"),
        ("Builtin", "acme", "'Builtin' of a distribution is"),
    ],
)
def test_builtin_is_reserved(site_folder, blocks, distribution, plugin, message):
    site_folder.install(distribution, {plugin: blocks("theirs")})
    registry = Registry()
    with pytest.warns(UserWarning, match=message):
        registry.discover(site_folder.entry_points())
    assert registry.entries() == ()
    assert [record.status for record in registry.plugins()] == ["failed"]


def test_a_config_says_whose_variant_and_host_it_means(registry):
    values = {
        "host": {"name": "best-ttt:shared"},
        "ttt": [{"variant": "best-ttt:shared", "layers": "0"}, {"variant": "acme-ttt:shared", "layers": "1"}],
    }
    config = parse_config(values, registry=registry)
    assert config.host.qualified_name == "best-ttt:shared"
    assert [entry.qualified_name for entry in config.ttt] == ["best-ttt:shared", "acme-ttt:shared"]
    assert [entry.variant for entry in config.ttt] == ["shared", "shared"]
    again = config.model_dump(mode="json")
    assert parse_host(again["host"], registry=registry) == config.host
    assert [parse_block(entry, registry=registry) for entry in again["ttt"]] == list(config.ttt)
    injection = inject(ToyModel(), config, registry=registry)
    made = [block.variant.provenance.distribution for block in injection.plan.blocks]
    assert made == ["best-ttt", "acme-ttt"]


def test_a_config_that_says_nothing_of_it_is_written_as_before():
    assert BlockConfig(variant="toy").model_dump() == {"variant": "toy", "layers": "all", "output_scale": 1.0}
    assert HostConfig(name="toy").model_dump(mode="json") == {"name": "toy"}
    assert HostConfig(name="toy", distribution="acme").model_dump() == {"name": "toy", "distribution": "acme"}


def test_two_answers_are_refused(registry):
    with pytest.raises(ConfigError, match="another distribution than distribution: 'acme-ttt'"):
        parse_block({"variant": "best-ttt:shared", "distribution": "acme-ttt"}, registry=registry)
    found = parse_block({"variant": "shared", "distribution": "acme-ttt"}, registry=registry)
    assert found.qualified_name == "acme-ttt:shared"


def test_an_adapter_is_loaded_with_the_variant_of_its_own_distribution(registry, tmp_path):
    values = {"host": {"name": "toy"}, "ttt": [{"variant": "acme-ttt:shared", "layers": "1"}]}
    injection = inject(ToyModel(), parse_config(values, registry=registry), registry=registry)
    folder = save_adapter(injection, tmp_path / "adapter")
    manifest = json.loads((folder / "adapter.json").read_text())
    assert "distribution" not in manifest["sites"][0]["config"]
    loaded = load_adapter(ToyModel(), folder, registry=registry)
    (block,) = loaded.plan.blocks
    assert block.variant.provenance.distribution == "acme-ttt"
    assert type(block.build()) is ToyBlock
    manifest["sites"][0]["distribution"] = "third-ttt"
    (folder / "adapter.json").write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="third-ttt"):
        load_adapter(ToyModel(), folder, registry=registry)


def test_an_adapter_does_not_fill_the_variant_of_another_distribution(registry, tmp_path):
    def injected(name: str):
        values = {"host": {"name": "toy"}, "ttt": [{"variant": name, "layers": "1"}]}
        return inject(ToyModel(), parse_config(values, registry=registry), registry=registry)

    folder = save_adapter(injected("acme-ttt:shared"), tmp_path / "adapter")
    assert fill_from_adapter(injected("acme-ttt:shared"), folder, registry=registry) == []
    with pytest.raises(AdapterError, match=r"holds the blocks .*acme-ttt:shared.* has .*best-ttt:shared"):
        fill_from_adapter(injected("best-ttt:shared"), folder, registry=registry)
