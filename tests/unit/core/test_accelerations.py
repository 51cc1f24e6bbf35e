"""Reports on faster forms: what a plugin registers, and what is refused."""

from __future__ import annotations

import pytest

from moshi_ttt.core.accelerations import Acceleration, accelerations_of
from moshi_ttt.core.errors import PluginError
from moshi_ttt.core.plugin_check import plugin_problems
from moshi_ttt.core.registry import Registry, default_registry

FAST = Acceleration(name="fast", purpose="Everything.", missing="There is no device. Buy one.")


def test_a_form_without_a_reason_is_available():
    assert not FAST.available
    assert Acceleration(name="fast", purpose="Everything.").available


def test_a_plugin_reports_by_its_hook(site_folder):
    source = (
        "from moshi_ttt.core.accelerations import Acceleration\n"
        "def report():\n    return (Acceleration(name='fast', purpose='Everything.'),)\n"
        "@hookimpl\ndef moshi_ttt_accelerations(registrar):\n"
        "    registrar.add('acme', f'{__name__}:report')\n"
    )
    site_folder.install("acme-ttt", {"acme": source})
    registry = site_folder.registry()
    assert accelerations_of("acme", registry) == (Acceleration(name="fast", purpose="Everything."),)
    assert accelerations_of("acme-ttt:acme", registry) == accelerations_of("acme", registry)
    assert plugin_problems(registry) == []


def test_a_variant_without_a_report_has_none():
    assert accelerations_of("no_such_variant", Registry()) == ()


def test_every_report_is_of_a_variant():
    registry = default_registry()
    assert set(registry.names("acceleration")) <= set(registry.names("block"))
    assert len(registry.names("acceleration")) == 5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("math:pi", r"is a float\. Register a function"),
        ("no_such_module:report", "No module named 'no_such_module'"),
        (lambda: [FAST], r"It has to return a tuple of Acceleration"),
        (lambda: ("fast",), r"returned \('fast',\)"),
    ],
)
def test_what_is_no_report_is_refused(target, message):
    registry = Registry()
    registry.register("acceleration", "odd", target)
    with pytest.raises(PluginError, match=message):
        accelerations_of("odd", registry)
    (problem,) = plugin_problems(registry)
    assert "acceleration 'odd'" in problem
