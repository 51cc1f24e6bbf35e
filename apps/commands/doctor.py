"""``moshi-ttt doctor``: run a few training passes and report problems of each block."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.apps.console import EXIT_FAILED, console


def doctor(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as tiny-ttt-mlp.")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", **PATH, help="Trained adapter to examine. Default: new blocks."),
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Number of training passes.")] = 3,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens in a pass. Default: more than two chunks.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the random tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    threads: Threads = None,
) -> None:
    """Run a few training passes on random tokens and report problems of each block.

    The config and the adapter are read, and nothing is changed.
    """
    from moshi_ttt.apps import doctor as examining
    from moshi_ttt.core.registry import default_registry

    found = examining.examine(
        config, default_registry(), adapter=adapter, batches=batches, length=length, seed=seed,
        processor_threads=threads,
    )  # fmt: skip
    if as_json:
        import json

        typer.echo(json.dumps(examining.to_json(found), indent=2))
    else:
        console().print(examining.render(found))
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)
