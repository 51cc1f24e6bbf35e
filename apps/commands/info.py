"""``moshi-ttt info``: versions, devices, compilers, and the faster forms of each variant."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from moshi_ttt.apps.console import EXIT_FAILED, console


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Print versions, devices, compilers, and what can run faster here.

    The faster forms of each variant are listed. Each form that cannot be used comes with the reason and what to do.
    Nothing is built, and no model is loaded.
    """
    from moshi_ttt.apps import info as informing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a plugin that does not load is among the problems
        found = informing.gather()
    if as_json:
        import json

        typer.echo(json.dumps(informing.to_json(found), indent=2))
    else:
        console().print(informing.render(found))
    if found.problems:
        raise typer.Exit(EXIT_FAILED)
