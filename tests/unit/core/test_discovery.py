"""Discovery: the plugins of installed distributions, one at a time, in sorted order, with their provenance."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from moshi_ttt.core.errors import DuplicateNameError, PluginError, UnknownNameError
from moshi_ttt.core.registrar import Provenance
from moshi_ttt.core.registry import Registry
from tests.unit.core.toy import ToyBlock


def discovered(site_folder, *, warn: str | None = None) -> Registry:
    """A registry filled from the folder; fails on a warning that was not expected and for one that did not come."""
    return site_folder.registry(warn=warn)


pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def test_installed_distribution_is_found_on_the_path(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("acme")}, version="2.3")
    registry = Registry()
    registry.discover()
    assert registry.entry("block", "acme").provenance == Provenance("acme", "acme-ttt", "2.3")
    assert "fp32_state" in registry.names("precision_policy"), "the built-in plugin comes in by the same door"


def test_name_knows_its_distribution_and_version(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("fast", "slow")}, version="2.3")
    registry = discovered(site_folder)
    variant = registry.block("slow")
    assert variant.factory is ToyBlock
    assert str(variant.provenance) == "acme-ttt 2.3 (plugin 'acme')"
    (record,) = registry.plugins()
    assert (record.status, record.names) == ("loaded", (("block", "fast"), ("block", "slow")))


def test_plugins_load_in_sorted_order_whatever_the_file_system_says(site_folder, blocks):
    for name in ("zeta", "alpha", "mid"):
        site_folder.install(f"dist-{name}", {name: blocks(name), f"b{name}": blocks(f"b{name}")})
    forwards, backwards = Registry(), Registry()
    forwards.discover(site_folder.entry_points())
    backwards.discover(site_folder.entry_points()[::-1])
    order = [record.provenance.plugin for record in forwards.plugins()]
    assert order == sorted(order)
    assert forwards.plugins() == backwards.plugins()


def test_importing_a_plugin_does_not_import_its_blocks(site_folder):
    site_folder.install(
        "acme-ttt",
        {"acme": "@hookimpl\ndef moshi_ttt_blocks(registrar):\n    registrar.add('x', config='no:C', block='no:B')\n"},
    )
    registry = discovered(site_folder)
    assert registry.names("block") == ("x",)
    with pytest.raises(PluginError, match=r"block 'x' of acme-ttt 1\.0.*cannot be imported from 'no:C'.*No module"):
        registry.block("x")


def test_string_that_names_no_attribute_raises_when_used(site_folder):
    source = (
        "@hookimpl\ndef moshi_ttt_blocks(registrar):\n"
        "    registrar.add('x', config='tests.unit.core.toy:ToyConfig', block='tests.unit.core.toy:Missing')\n"
    )
    site_folder.install("acme-ttt", {"acme": source})
    with pytest.raises(PluginError, match=r"'tests.unit.core.toy:Missing'.*AttributeError"):
        discovered(site_folder).block("x")


# ---- one bad plugin


BROKEN = {
    "import": ("import a_library_that_is_not_there\n", "failed", "No module named 'a_library_that_is_not_there'"),
    "any error": ("raise KeyError('no device')\n", "failed", "KeyError: 'no device'"),
    "exit": ("raise SystemExit('this plugin needs a GPU')\n", "failed", "needs a GPU"),
    "hook": ("@hookimpl\ndef moshi_ttt_blocks(registrar):\n    1 / 0\n", "failed", "ZeroDivisionError"),
    "unknown hook": (
        "@hookimpl\ndef moshi_ttt_block(registrar):\n    pass\n",
        "failed",
        "Did you mean 'moshi_ttt_blocks'",
    ),
    "argument": ("@hookimpl\ndef moshi_ttt_blocks(registry):\n    pass\n", "failed", "registry"),
    "no config": (
        "@hookimpl\ndef moshi_ttt_blocks(registrar):\n    registrar.add('x', block=1)\n",
        "failed",
        "config=",
    ),
    "bad name": (
        "@hookimpl\ndef moshi_ttt_blocks(registrar):\n    registrar.add('x y', config=1, block=1)\n",
        "failed",
        "letters, digits",
    ),
    "newer API": ("MOSHI_TTT_API = 2\n", "outdated", "MOSHI_TTT_API = 2, this is version 1. Install a version of bad"),
    "no API": ("del MOSHI_TTT_API\n", "outdated", "Its author writes MOSHI_TTT_API = 1"),
}


@pytest.mark.parametrize(("source", "status", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_is_recorded_and_harmless_until_asked_for(site_folder, blocks, source, status, reason):
    site_folder.install("bad-dist", {"bad": source}, version="0.9")
    site_folder.install("good-dist", {"zgood": blocks("good"), "agood": blocks("early")})
    registry = discovered(site_folder, warn=rf"bad-dist 0\.9.*is {status}")
    assert registry.names("block") == ("early", "good")
    registry.block("good")
    record = next(r for r in registry.plugins() if r.provenance.plugin == "bad")
    assert record.status == status
    assert reason in record.reason
    with pytest.raises(PluginError) as asked:
        registry.block("bad")
    assert "bad-dist 0.9" in str(asked.value)
    assert reason in str(asked.value)


def test_unknown_name_mentions_the_plugins_that_did_not_load(site_folder):
    site_folder.install("bad-dist", {"bad": "import a_library_that_is_not_there\n"})
    registry = discovered(site_folder, warn="failed")
    with pytest.raises(UnknownNameError, match=r"bad-dist.*a_library_that_is_not_there"):
        registry.block("its_variant")


@pytest.mark.parametrize("later_hook", ["moshi_ttt_precision_policies", "moshi_ttt_verifiers"])
def test_hook_that_raises_midway_registers_nothing(site_folder, blocks, later_hook):
    source = blocks("first", "second") + f"@hookimpl\ndef {later_hook}(registrar):\n    raise OSError('midway')\n"
    site_folder.install("bad-dist", {"bad": source})
    registry = discovered(site_folder, warn="midway")
    assert registry.entries() == ()


# ---- one name, two plugins


def test_duplicate_name_names_both_distributions(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("shared", "acme_only")}, version="1.1")
    site_folder.install("best-ttt", {"best": blocks("shared", "best_only")}, version="2.2")
    site_folder.install("last-ttt", {"last": blocks("last_only")})
    registry = discovered(site_folder, warn="'shared' is claimed by acme-ttt 1.1.*best-ttt 2.2")
    for name in ("acme_only", "best_only", "last_only"):
        registry.block(name)
    with pytest.raises(DuplicateNameError, match=r"acme-ttt 1\.1.*best-ttt 2\.2.*MOSHI_TTT_PLUGINS"):
        registry.block("shared")
    assert [record.status for record in registry.plugins()] == ["loaded", "duplicate", "loaded"]


def test_duplicate_under_one_entry_point_name_is_told_apart(site_folder, blocks):
    site_folder.install("acme-ttt", {"same": blocks("shared")})
    site_folder.install("best-ttt", {"same": blocks("shared")})
    registry = discovered(site_folder, warn="claimed by acme-ttt.*best-ttt")
    with pytest.raises(DuplicateNameError, match=r"acme-ttt.*best-ttt"):
        registry.block("shared")


def test_one_name_of_two_kinds_is_no_duplicate(site_folder, blocks):
    policy = (
        "from moshi_ttt.core.precision import PrecisionPolicy\n"
        "@hookimpl\ndef moshi_ttt_precision_policies(registrar):\n"
        "    registrar.add('acme', PrecisionPolicy(name='acme'))\n"
    )
    site_folder.install("acme-ttt", {"acme": blocks("acme") + policy})
    registry = discovered(site_folder)
    assert registry.policy("acme").name == registry.block("acme").name


def test_plugin_that_claims_a_name_twice_is_refused(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("twice", "other", "twice")})
    registry = discovered(site_folder, warn="twice")
    (record,) = registry.plugins()
    assert record.status != "loaded"


def test_override_stands_in_for_a_duplicate(site_folder, blocks):
    site_folder.install("acme-ttt", {"acme": blocks("shared")})
    site_folder.install("best-ttt", {"best": blocks("shared")})
    registry = discovered(site_folder, warn="shared")
    with registry.override("block", "shared", ToyBlock):
        assert registry.block("shared").factory is ToyBlock
    with pytest.raises(DuplicateNameError):
        registry.block("shared")


# ---- MOSHI_TTT_PLUGINS


@pytest.mark.parametrize(
    ("value", "loaded"),
    [
        ("acme", {"acme", "builtin"}),
        ("acme, best", {"acme", "best", "builtin"}),
        ("", {"builtin"}),
        ("no", {"builtin"}),
    ],
)
def test_environment_restricts_what_is_loaded(site_folder, blocks, monkeypatch, value, loaded):
    for name in ("acme", "best", "bad", "builtin"):
        distribution = "moshi-ttt" if name == "builtin" else f"{name}-dist"
        site_folder.install(distribution, {name: "1 / 0" if name == "bad" else blocks(name)})
    monkeypatch.setenv("MOSHI_TTT_PLUGINS", value)
    expected = pytest.warns(UserWarning, match="not installed: no") if value == "no" else nullcontext()
    with expected:
        registry = discovered(site_folder)
    assert set(registry.names("block")) == loaded
    disabled = [record for record in registry.plugins() if record.status == "disabled"]
    assert {record.provenance.plugin for record in disabled} == {"acme", "best", "bad", "builtin"} - loaded


def test_disabled_plugin_that_is_asked_for_raises(site_folder, blocks, monkeypatch):
    site_folder.install("acme-ttt", {"acme": blocks("acme")})
    monkeypatch.setenv("MOSHI_TTT_PLUGINS", "something_else")
    with (
        pytest.warns(UserWarning, match="not installed: something_else"),
        pytest.raises(PluginError, match="disabled: not listed in MOSHI_TTT_PLUGINS"),
    ):
        discovered(site_folder).block("acme")
