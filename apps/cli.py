"""The command line ``moshi-ttt``: each command is a module of ``apps/commands``.

Nothing heavy is imported until a command runs: ``--help`` and ``--version`` must not wait for torch.
"""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from moshi_ttt.apps.commands import (
    completion,
    doctor,
    encode,
    evaluate,
    explain,
    generate,
    info,
    new_plugin,
    plugins,
    quickstart,
    serve,
    train,
    verify,
)
from moshi_ttt.apps.commands.manuals import MANUALS, PROGRAM
from moshi_ttt.apps.console import Commands, run, show_warning
from moshi_ttt.apps.manual import documented, group_with

app = typer.Typer(
    cls=group_with(PROGRAM, Commands),
    name="moshi-ttt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Test-time-training (TTT) layers for Moshi: layers whose weights keep learning during inference.\n\n"
        "Start with [bold]moshi-ttt quickstart[/]: it trains such layers inside a small Moshi on recorded speech, "
        "streams a recording through it, and writes a folder with a report. It needs no GPU and no download."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"moshi-ttt {version('moshi-ttt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    warnings.showwarning = show_warning


documented(app, "quickstart", MANUALS["quickstart"])(quickstart.quickstart)
documented(app, "train", MANUALS["train"])(train.train)
documented(app, "encode", MANUALS["encode"])(encode.encode)
documented(app, "serve", MANUALS["serve"])(serve.serve)
app.add_typer(evaluate.app, name="evaluate")
documented(app, "generate", MANUALS["generate"])(generate.generate)
documented(app, "explain", MANUALS["explain"])(explain.explain)
documented(app, "doctor", MANUALS["doctor"])(doctor.doctor)
documented(app, "plugins", MANUALS["plugins"])(plugins.plugins)
documented(app, "info", MANUALS["info"])(info.info)
documented(app, "new-plugin", MANUALS["new-plugin"])(new_plugin.new_plugin)
documented(app, "verify", MANUALS["verify"])(verify.verify)
documented(app, "completion", MANUALS["completion"])(completion.completion)


def main() -> None:
    """The console entry point."""
    run(app)


if __name__ == "__main__":
    main()
