"""``moshi-ttt encode``: encode the recordings of a training config once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH
from moshi_ttt.apps.console import console


def encode(
    config: Annotated[str, typer.Argument(help="A training config: a YAML file, or the name of a packaged config.")],
    out: Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options to change.")] = None,
    held_out: Annotated[bool, typer.Option("--eval", help="Encode data.eval_data instead of data.train_data.")] = False,
) -> None:
    """Encode the recordings of a training config into shards.

    Training reads them with data.train_data=OUT. A run that reads recordings encodes them again in every epoch. Shards
    hold the same tokens.
    """
    from moshi_ttt.configs import settings as reading
    from moshi_ttt.core.registry import default_registry
    from moshi_ttt.data import encoding

    settings = reading.read_settings(config, overrides or [], default_registry())
    encoding.encode(settings, out, console(), held_out=held_out)
