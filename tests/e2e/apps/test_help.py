"""``--help`` of every command is a manual: summary, description, options with defaults, examples, exit codes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from moshi_ttt.apps.cli import app
from moshi_ttt.apps.commands.manuals import MANUALS
from moshi_ttt.apps.manual import command_with, flowing, manual

LONGEST_SUMMARY = 77
"""Letters of a summary: it is one line of a terminal with 80 columns."""
PROGRAM: Any = typer.main.get_command(app)


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that ``--help`` lists, by its words behind ``moshi-ttt``."""
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from walk(inner, (*words, name))


COMMANDS = dict(walk(PROGRAM))
every_command = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "moshi-ttt")


def test_every_command_has_a_manual_and_every_manual_a_command():
    assert {" ".join(words) for words in COMMANDS if words} == set(MANUALS)
    assert len(COMMANDS) > 15


@every_command
def test_help_has_every_part(words):
    result = CliRunner().invoke(app, [*words, "--help"], env={"TERMINAL_WIDTH": "100"}, catch_exceptions=False)
    said = result.stdout
    assert result.exit_code == 0
    places = [said.find(part) for part in ("Usage: ", "Options", "Examples:\n", "Exit codes:\n")]
    assert -1 not in places, said
    assert places == sorted(places), "the parts come in the order of a manual"
    text = type(COMMANDS[words]).manual
    for example, meaning in text.examples.items():
        assert f"  $ {example}\n" in said
        assert meaning in said
    assert {0, 2, 130} <= text.exit_codes.keys()
    for code, meaning in text.exit_codes.items():
        assert re.search(rf"^ +{code} +{re.escape(meaning)}$", said, re.MULTILINE), meaning


@every_command
def test_a_summary_of_one_line_and_a_description(words):
    summary, *description = (COMMANDS[words].help or "").split("\n\n")
    summary = " ".join(summary.split())
    assert summary.endswith("."), summary
    assert words == () or len(summary) <= LONGEST_SUMMARY, f"{summary} has {len(summary)} letters"
    assert "".join(description).strip(), "a paragraph that says more than the summary"


@every_command
def test_every_option_says_what_it_is_and_what_its_default_is(words):
    silent = []
    for parameter in COMMANDS[words].params:
        if parameter.hidden or parameter.name in ("help", "version"):
            continue
        told = parameter.help or ""
        shown = parameter.required or parameter.default not in (None, ()) or "Default: " in told
        if not told or not (shown or parameter.param_type_name == "argument"):
            silent.append(parameter.name)
    assert silent == [], "add a help text, and `Default: ...` where the default is no value"


def examples() -> list[str]:
    return sorted({example for _, command in COMMANDS.items() for example in type(command).manual.examples})


@pytest.mark.parametrize("example", examples())
def test_every_example_is_a_command_line_that_can_be_read(example):
    line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", example).split(" > ")[0]
    words = shlex.split(line)
    if words[0] == "torchrun":
        assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "moshi_ttt"]
        words = ["moshi-ttt", *words[5:]]
    assert words[0] == "moshi-ttt"
    command, context, rest = PROGRAM, None, words[1:]
    if "--help" in rest:
        assert CliRunner().invoke(app, rest).exit_code == 0
        return
    while hasattr(command, "commands"):
        name, *rest = rest
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        command = command.commands[name]
    command.make_context(name, rest, parent=context)  # raises where an option or argument is wrong


def test_a_wrong_example_would_be_noticed():
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        COMMANDS["explain",].make_context("explain", ["tiny-ttt-mlp", "--jsn"])


def test_a_command_may_change_the_meaning_of_a_shared_exit_code():
    text = manual(examples={"moshi-ttt x": "Do it."}, exit_codes={0: "All is well.", 7: "Seven."})
    assert dict(text.exit_codes) == {0: "All is well.", 2: text.exit_codes[2], 7: "Seven.", 130: text.exit_codes[130]}
    assert text.lines()[-4:][0] == "  0    All is well."
    assert command_with(text).manual is text


def test_a_paragraph_of_a_docstring_is_one_line():
    assert (
        flowing("""First line.

    A second
    paragraph.
    """)
        == "First line.\n\nA second paragraph."
    )
    assert "\n" not in COMMANDS["train",].help.split("\n\n")[1]
