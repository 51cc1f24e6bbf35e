"""``moshi-ttt plugins``: list what is installed, and who provides it; check that all of it can be used."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from moshi_ttt.apps.console import EXIT_FAILED, console


def plugins(
    check: Annotated[
        bool, typer.Option("--check", help="Also import every target; exit with code 1 and the reasons if one fails.")
    ] = False,
) -> None:
    """List every registered name, its kind, and who provides it.

    Kinds are variants, hosts, precision policies, format adapters, verifiers, weight maps, and reports on
    accelerations. A plugin that could not be loaded is listed with the reason; it is harmless until a config asks for
    it.
    """
    from rich.text import Text

    from moshi_ttt.apps import plugins as listing
    from moshi_ttt.core.plugin_check import plugin_problems
    from moshi_ttt.core.registry import default_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # discovery warns about what the table is about to show
        registry = default_registry()
    console().print(listing.render(registry))
    if not check:
        return
    problems = plugin_problems(registry)
    for problem in problems:
        console().print(Text(problem, style="red", overflow="fold"))
    if problems:
        raise typer.Exit(EXIT_FAILED)
    console().print(f"All {len(registry.all_claims())} targets can be used.")
