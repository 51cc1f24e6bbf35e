"""``moshi-ttt explain``: show what a config would add to its model."""

from __future__ import annotations

from typing import Annotated

import typer

from moshi_ttt.apps.console import console


def explain(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as tiny-ttt-mlp.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers instead of tables.")] = False,
) -> None:
    """Show what a config would add to its model, without reading weights.

    This is the sites, parameters, state, compute, and the dtype of each role. The model is built
    without storage, so this takes seconds for a model of any size.
    """
    from moshi_ttt.apps import explain as explaining

    explanation = explaining.explain(config)
    if as_json:
        import json

        typer.echo(json.dumps(explaining.to_json(explanation), indent=2))
    else:
        console().print(explaining.render(explanation))
