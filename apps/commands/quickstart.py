"""``moshi-ttt quickstart``: train TTT layers inside a small Moshi on real speech, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.apps.console import console


def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")] = Path(
        "quickstart-run"
    ),
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or the name of a packaged config.")
    ] = "quickstart",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps. Default: the config's max_steps.")
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            "--audio",
            **PATH,
            help="Your own recording to stream (wav, ogg, flac, mp3). Default: a held-out one.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Seed of initial values, segments and sampling. Default: the config's.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out if an earlier quickstart made it.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train TTT layers inside a small Moshi on real speech, and write a report.

    It also streams a recording through the model. Takes about two minutes on a CPU. Everything it needs ships with the
    package. The folder it writes has the trained adapter, report.md, plots, the generated audio, and every number in
    metrics.json.
    """
    from moshi_ttt.apps.quickstart.run import run
    from moshi_ttt.apps.quickstart.setup import Request

    request = Request(
        out=out, config=config, steps=steps, audio=audio, seed=seed, overwrite=overwrite, threads=threads
    )  # fmt: skip
    run(request, console())
