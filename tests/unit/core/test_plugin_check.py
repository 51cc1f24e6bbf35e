"""``plugin_problems``: every plugin that did not load, and every target that cannot be used."""

from __future__ import annotations

import pytest

from moshi_ttt.core.plugin_check import plugin_problems
from moshi_ttt.core.registry import default_registry

ADD = "@hookimpl\ndef moshi_ttt_{hook}(registrar):\n    registrar.add('{name}', {target})\n"


def found(site_folder, sources: dict[str, str], *, warn: str | None = None) -> list[str]:
    for name, source in sources.items():
        site_folder.install(f"{name}-ttt", {name: source})
    return plugin_problems(site_folder.registry(warn=warn))


def test_what_is_installed_here_has_no_problem():
    assert plugin_problems(default_registry()) == []


def test_a_target_that_cannot_be_imported_is_a_problem(site_folder, blocks):
    lazy = "config='tests.unit.core.toy:ToyConfig', block='no_such_module:Block'"
    bad = ADD.format(hook="blocks", name="bad", target=lazy)
    (problem,) = found(site_folder, {"acme": bad, "good": blocks("good")})
    assert problem.startswith("block 'bad' of acme-ttt 1.0 (plugin 'acme'): PluginError: ")
    assert "No module named 'no_such_module'" in problem


@pytest.mark.parametrize(
    ("hook", "target", "message"),
    [
        ("hosts", "'math:pi'", "is a float, expected HostModel"),
        ("precision_policies", "'math:pi'", "expected PrecisionPolicy"),
        ("format_adapters", "'math:pi'", "expected FormatAdapter"),
        ("verifiers", "'math:pi'", "expected Verifier"),
        ("weight_maps", "'math:pi'", "expected WeightMap"),
        ("accelerations", "'math:pi'", "Register a function"),
        ("blocks", "config='math:pi', block='tests.unit.core.toy:ToyBlock'", "not a BlockConfig subclass"),
        ("blocks", "config='tests.unit.core.toy:ToyConfig', block='math:pi'", "register a block class"),
    ],
)
def test_a_target_of_another_kind_is_a_problem(site_folder, hook, target, message):
    (problem,) = found(site_folder, {"acme": ADD.format(hook=hook, name="bad", target=target)})
    assert message in problem


def test_a_module_that_exits_is_a_problem_and_does_not_end_the_check(site_folder, blocks):
    target = "config='tests.unit.core.toy:ToyConfig', block='fake_exits:Block'"
    (site_folder.path / "fake_exits.py").write_text("raise SystemExit(0)\n")
    bad = ADD.format(hook="blocks", name="bad", target=target)
    problems = found(site_folder, {"acme": bad, "worse": ADD.format(hook="hosts", name="w", target="'math:pi'")})
    assert ["SystemExit" in problems[0], "HostModel" in problems[1], len(problems)] == [True, True, 2]


def test_plugins_that_did_not_load_and_names_that_clash_are_problems(site_folder, blocks):
    sources = {"acme": blocks("shared"), "bad": "import a_library_that_is_not_there\n", "best": blocks("shared")}
    problems = found(site_folder, sources, warn=".")
    assert len(problems) == 2
    assert "bad-ttt" in problems[0]
    assert "a_library_that_is_not_there" in problems[0]
    assert "'shared' is claimed by acme-ttt" in problems[1]


def test_a_broken_second_claim_is_found(site_folder, blocks):
    lazy = "config='tests.unit.core.toy:ToyConfig', block='no_such_module:Block'"
    sources = {"acme": blocks("shared"), "best": ADD.format(hook="blocks", name="shared", target=lazy)}
    problems = found(site_folder, sources, warn=".")
    assert any("of best-ttt" in problem and "no_such_module" in problem for problem in problems)


def test_what_is_left_out_is_no_problem_and_what_is_missing_is_one(site_folder, monkeypatch):
    monkeypatch.setenv("MOSHI_TTT_PLUGINS", "absent")
    (problem,) = found(site_folder, {"bad": "1 / 0\n"}, warn="absent")
    assert "not installed: absent" in problem
