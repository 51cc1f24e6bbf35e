"""``moshi-ttt new-plugin``: write a plugin package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the variant, such as my_memory.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", **PATH, help="Folder to write. It must not exist. Default: ./moshi-ttt-NAME."),
    ] = None,
) -> None:
    """Write a plugin package with a small working variant, its tests and a config.

    It passes the conformance kit. Install it with pip, then replace its computation with your own.
    """
    from moshi_ttt.apps import new_plugin as making
    from moshi_ttt.core.registry import default_registry

    folder = Path(making.distribution(name)) if out is None else out
    for path in making.create(name, folder, default_registry()):
        typer.echo(path)
    typer.echo(f'Next: pip install -e "{folder}[test]", then pytest {folder}')
