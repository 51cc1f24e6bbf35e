"""The reference is made from the code, and says something of everything in it."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

import moshi_ttt
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.registry import HOOKS
from tests.project import ROOT


@pytest.fixture(scope="module")
def reference():
    """The module that makes the pages, imported from its folder as mkdocs does."""
    folder = str(ROOT / "scripts" / "docs_site")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("reference")
    finally:
        sys.path.remove(folder)


def test_every_placeholder_is_one_that_is_made_and_is_on_a_page(reference):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    used = [name for text in pages for name in re.findall(r"^<!-- generated: (\S+) -->$", text, flags=re.MULTILINE)]
    assert sorted(used) == sorted(reference.PARTS)


def test_every_command_and_option_is_listed(reference):
    import typer.main

    from moshi_ttt.apps.cli import app

    text = reference.make("commands")
    group = typer.main.get_command(app)
    shown = {name: command for name, command in group.commands.items() if not command.hidden}
    assert len(shown) > 10
    for name, command in shown.items():
        section = re.search(rf"^## moshi-ttt {name}\n(.*?)(?=^## moshi-ttt (?!{name} )|\Z)", text, re.M | re.S)[1]
        inner = getattr(command, "commands", {"": command}).values()
        for parameter in (each for one in inner if not one.hidden for each in one.params):
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert f"`{parameter.opts[0]}" in section, f"{name} {parameter.opts}"
                assert parameter.help, f"moshi-ttt {name} {parameter.opts[0]} has no help"
            elif not getattr(parameter, "hidden", False):
                assert parameter.help, f"moshi-ttt {name} {parameter.name} has no help"


def test_every_key_of_every_config_has_a_meaning(reference):
    from config_keys import config_models, descriptions

    models = dict(config_models())
    assert {f"variant: {name}" for name in ("ttt_linear", "ttt_mlp", "ttt_multilayer", "gating_mlp", "ttt_ridge")} <= (
        models.keys()
    )
    lacking = [
        f"{model.__name__}.{key}"
        for model in models.values()
        for key in model.model_fields
        if key not in descriptions(model)
    ]
    assert lacking == []
    text = "\n" + reference.make("configuration")
    assert all(f"\n## {title}\n" in text for title in models)
    assert "| `chunk` | integer, ≥ 1 | `32` | tokens per inner-loop step (mini-batch). |" in text


def test_a_description_may_be_of_several_keys_and_lines(reference):
    from config_keys import descriptions
    from pydantic import BaseModel

    class Base(BaseModel):
        """Sum.

        Attributes:
            a, b: two
                lines.
            c: one.

        Raises:
            d: none.
        """

    assert descriptions(Base) == {"a": "two lines.", "b": "two lines.", "c": "one."}


def test_public_names_hooks_and_errors_are_listed(reference):
    python = reference.make("python")
    assert all(f"::: moshi_ttt.{name}\n" in python for name in set(moshi_ttt.__all__) - {
        "evaluation", "testing", "training", "__version__"
    })  # fmt: skip
    assert python.index("::: moshi_ttt.load_model\n") < python.index("::: moshi_ttt.GateConfig\n"), "functions first"
    hooks = reference.make("hooks")
    assert all(f"\n## {name}\n" in hooks for name in HOOKS.values())
    errors = reference.make("errors")
    ours = [kind for kind in MoshiTTTError.__subclasses__() if kind.__module__.startswith("moshi_ttt.")]
    assert all(f"| `{kind.__name__}` |" in errors for kind in ours)
    assert "`AudioError`" in errors
