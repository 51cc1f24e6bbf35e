"""Options that several commands share: a command with a dataclass as a parameter has the options of its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from moshi_ttt.apps.shared_options import renamed_option, with_shared_options
from moshi_ttt.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Written:
    out: Annotated[str, typer.Option("--out", "-o")]
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False


@dataclass(frozen=True, kw_only=True)
class Read(Written):
    name: Annotated[str, typer.Argument()]
    size: Annotated[int, typer.Option("--size", min=1)] = 4


def run(*arguments: str):
    """What a command with shared options and one of its own is called with."""
    called = []
    app = typer.Typer()

    @app.command()
    @with_shared_options
    def command(ctx: typer.Context, shared: Read, seed: Annotated[int, typer.Option("--seed")] = 0) -> None:
        """Does a thing."""
        called.append((ctx.info_name, shared, seed))

    return CliRunner().invoke(app, list(arguments)), called


def test_a_command_gets_its_shared_options_in_one_object_and_its_own_beside_it():
    result, called = run("base", "-o", "here", "--seed", "3")
    assert result.exit_code == 0, result.output
    ((_, shared, seed),) = called
    assert (shared, seed) == (Read(name="base", out="here", overwrite=False, size=4), 3)
    assert run("base", "--out", "here", "--overwrite", "--size", "9")[1][0][1].size == 9


def test_help_shows_the_options_of_every_field():
    shown = run("--help")[0].output
    assert all(option in shown for option in ("--out", "--overwrite", "--size", "--seed", "Does a thing."))
    assert "shared" not in shown


@pytest.mark.parametrize("arguments", [["base"], ["--out", "here"], ["base", "--out", "here", "--size", "0"]])
def test_what_typer_refuses_of_a_parameter_it_refuses_of_a_field(arguments):
    result, called = run(*arguments)
    assert (result.exit_code, called) == (2, [])


def test_an_option_under_its_earlier_name(capsys):
    assert renamed_option("--pieces", None, "--clips", 3) == 3
    assert capsys.readouterr().err == ""
    assert renamed_option("--pieces", 2, "--clips", None) == 2
    assert "Warning: --pieces is now --clips" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"the same option\. Give --clips alone"):
        renamed_option("--pieces", 2, "--clips", 3)
