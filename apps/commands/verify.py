"""``moshi-ttt verify``: check the installed code against reference vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH
from moshi_ttt.apps.console import EXIT_FAILED, console
from moshi_ttt.system.threads import computing


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE_OR_FOLDER...",
            parser=PATH["parser"],
            help="Files of reference vectors, or folders of such files.",
        ),
    ],
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every output and gradient, not only the worst.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run the forms of one backend alone, such as cpp, which is built first. "
            "Default: all forms that need no build.",
        ),
    ] = None,
) -> None:
    """Check the installed code against reference vectors.

    The files are safetensors, and hold inputs, outputs and gradients. Every installed variant that computes a file is
    compared with it, in each of its forms.
    """
    from moshi_ttt.apps import verify as verifying
    from moshi_ttt.core.registry import default_registry

    registry = default_registry()
    screen = console()
    reports = []
    with computing(parameters=0):  # reference vectors are small
        for path in verifying.expand(paths):
            reports.append(verifying.verify_file(path, registry, backend))
            screen.print(verifying.render(reports[-1], every=show_all))
    screen.print(verifying.summary(reports))
    compared = any(report.comparisons for report in reports)
    if not compared or not all(report.passed for report in reports):
        raise typer.Exit(EXIT_FAILED)
