"""The command line ``moshi-ttt``. Each command is a few lines here; what it does is in a module of its own.

Nothing heavy is imported until a command runs: ``--help`` and ``--version`` must not wait for torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.apps.commands.evaluate import app as evaluate_app
from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.system.interruption import EXIT_STOPPED, Interruption, StopRequest, handle, stop_signals
from moshi_ttt.system.threads import computing, prepare_environment

if TYPE_CHECKING:
    from rich.console import Console

    from moshi_ttt.training.step import Outcome

EXIT_FAILED = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_interruption = Interruption()
"""What a signal does in a process of the command line, until a training takes it over."""


class _Commands(TyperGroup):
    """Every command: an error that a user can meet is a message, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if _was_interrupted(error):
                _errors().print("\n[bold]Interrupted.[/] Nothing half-written was left behind.")
                raise typer.Exit(EXIT_INTERRUPTED) from None
            if not isinstance(error, (MoshiTTTError, OSError)):
                raise
            end = "." if isinstance(error, OSError) else ""
            _errors().print(f"[bold red]Error:[/] {_plain(error)}{end}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from None


app = typer.Typer(
    cls=_Commands,
    name="moshi-ttt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Test-time-training layers for Moshi: a memory that learns while it listens.\n\n"
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
    warnings.showwarning = _show_warning


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")] = Path(
        "quickstart-run"
    ),
    config: Annotated[
        str, typer.Option("--config", "-c", help="A YAML file, or the name of a packaged config.")
    ] = "quickstart",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps; the config's `train.steps` if left out.")
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            "--audio",
            **PATH,
            help="Your own recording to stream (wav, ogg, flac, mp3); a held-out one if left out.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Seed of initial values, segments and sampling; the config's if left out.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out if an earlier quickstart made it.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Train test-time-training layers inside a small Moshi on real speech, stream a recording, write a report.

    Takes about two minutes on a CPU. Everything it needs ships with the package. The folder it writes
    has the trained adapter, report.md, plots, the generated audio, and every number in metrics.json.
    """
    from moshi_ttt.apps.quickstart.run import run
    from moshi_ttt.apps.quickstart.setup import Request

    request = Request(
        out=out, config=config, steps=steps, audio=audio, seed=seed, overwrite=overwrite, threads=threads
    )  # fmt: skip
    run(request, _console())


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file as moshi-finetune reads it, or a packaged config's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, as in optim.lr=1e-5 resume=true.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be trained and what it takes, and stop. Reads no weights.")
    ] = False,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="With --plan: ranks to share the model over.")] = 1,
) -> None:
    """Fine-tune Moshi: TTT blocks, LoRA, or everything, on one process or on many.

    Several processes: torchrun --nproc-per-node 8 -m moshi_ttt train CONFIG. Ctrl-C or a termination saves a checkpoint
    and ends; resume=true goes on from it.

    Exit code 0 when the run is done, 75 when it was stopped as asked and can be resumed (with do_ckpt: false nothing
    was saved), 2 for an error, 130 when a second Ctrl-C ended it without saving. torchrun makes 1 of the last three;
    "status" in RUN_DIR/run.json tells them.
    """
    with StopRequest(final=(_interruption,)) as stop:
        try:
            outcome = _train(config, overrides or [], stop, plan=plan, ranks=ranks)
        except (Exception, KeyboardInterrupt) as error:
            # Asked to stop, a rank leaves; one that is waiting for it meets an error of its own.
            if stop.started or not (stop.asked or _was_interrupted(error)):
                raise
            _errors().print("Stopped as asked before the first step; there was nothing to save.")
            stopped = True
        else:
            stopped = outcome is not None and outcome.stopped
        if stopped:
            raise typer.Exit(EXIT_STOPPED)


def _train(config: str, overrides: list[str], stop: StopRequest, *, plan: bool, ranks: int) -> Outcome | None:
    """Train; or show what would be, and nothing comes of it."""
    from moshi_ttt.configs import settings as reading
    from moshi_ttt.core.registry import default_registry

    registry = default_registry()
    settings = reading.read_settings(config, overrides, registry)
    if plan:
        from moshi_ttt.training import planning

        _console().print(planning.render(planning.plan(settings, registry, ranks=ranks, activations=True)))
        return None
    from moshi_ttt.training.run import run

    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own writing of checkpoints
    return run(settings, registry, _console(), stop)


@app.command()
def encode(
    config: Annotated[str, typer.Argument(help="The YAML file of the training, or a packaged config's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes.")] = None,
    held_out: Annotated[bool, typer.Option("--eval", help="Encode data.eval_data instead of data.train_data.")] = False,
) -> None:
    """Encode the recordings of a training once, into shards that it reads instead: data.train_data=OUT.

    Every run that reads recordings themselves encodes them anew in every epoch; shards hold the very same numbers.
    """
    from moshi_ttt.configs import settings as reading
    from moshi_ttt.core.registry import default_registry
    from moshi_ttt.data import encoding

    settings = reading.read_settings(config, overrides or [], default_registry())
    encoding.encode(settings, out, _console(), held_out=held_out)


app.add_typer(evaluate_app, name="evaluate")


@app.command()
def study(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", **PATH, help="Folder of everything it makes; what is there is kept."),
    ],
    known: Annotated[
        list[Path],
        typer.Option(
            "--known",
            **PATH,
            help="A folder with train.jsonl, valid.jsonl, test.jsonl; may be repeated.",
        ),
    ],
    unseen: Annotated[
        list[Path] | None,
        typer.Option("--unseen", **PATH, help="The same, of voices for testing alone; may be repeated."),
    ] = None,
    at_once: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Processor threads of each run; one if left out.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Very small: shows that everything runs.")] = False,
) -> None:
    """Train each variant and LoRA on a small Moshi with a short attention, and report what memory is worth.

    It takes about an hour a seed. Interrupted, the same command goes on. The report is in OUT/report.
    """
    from moshi_ttt.apps.study import plan
    from moshi_ttt.apps.study.command import make

    report = make(
        out, known=known, unseen=unseen or [], scale=plan.SMOKE if smoke else plan.FULL, subjects=plan.SUBJECTS,
        ablations=plan.ABLATIONS, at_once=at_once, threads=threads, say=lambda text: typer.echo(text),
    )  # fmt: skip
    typer.echo((report / "report.md").read_text(encoding="utf-8"))


@app.command()
def explain(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as tiny-ttt-mlp.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with exact numbers instead of tables.")] = False,
) -> None:
    """Show what a config would add to its model: sites, parameters, state, compute, and the dtype of each role.

    The model's architecture is built without storage, so this takes seconds for any size; no weights are read.
    """
    from moshi_ttt.apps import explain as explaining

    explanation = explaining.explain(config)
    if as_json:
        import json

        typer.echo(json.dumps(explaining.to_json(explanation), indent=2))
    else:
        _console().print(explaining.render(explanation))


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as tiny-ttt-mlp.")],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", **PATH, help="Examine this trained adapter; new blocks if left out."),
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Training passes to look at.")] = 3,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens a pass; more than two chunks if left out.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the made-up tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    threads: Threads = None,
) -> None:
    """Run a few training passes on made-up tokens and report what is wrong with each block. Nothing is changed.

    Exit code 0 when every block is healthy, 1 when one has a red flag, 2 when the config cannot be used.
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
        _console().print(examining.render(found))
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plugins() -> None:
    """List every variant, host, precision policy, format adapter and verifier, and who provides it.

    A plugin that could not be loaded is listed with the reason; it is harmless until a config asks for it.
    """
    from moshi_ttt.apps import plugins as listing
    from moshi_ttt.core.registry import default_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # discovery warns about what the table is about to show
        registry = default_registry()
    _console().print(listing.render(registry))


@app.command()
def new_plugin(
    name: Annotated[str, typer.Argument(help="What the variant will be called, as in my_memory.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", **PATH, help="Folder to write, which must not exist; moshi-ttt-NAME here."),
    ] = None,
) -> None:
    """Write a plugin of your own: a distribution with a small working variant, its tests and a config.

    It passes the conformance kit as it is. Install it with pip, then replace its mathematics by yours.
    """
    from moshi_ttt.apps import new_plugin as making
    from moshi_ttt.core.registry import default_registry

    folder = Path(making.distribution(name)) if out is None else out
    for path in making.create(name, folder, default_registry()):
        typer.echo(path)
    typer.echo(f'Next: pip install -e "{folder}[test]", then pytest {folder}')


@app.command()
def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE_OR_FOLDER...", parser=PATH["parser"], help="Files of reference vectors, or folders of them."
        ),
    ],
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every output and gradient, not the worst alone.")
    ] = False,
) -> None:
    """Check the installed code against reference vectors (safetensors files), outputs and gradients.

    Exit code 0 when every file is within tolerance, 1 when one is not or when no installed plugin computes it,
    2 when a file cannot be read.
    """
    from moshi_ttt.apps import verify as verifying
    from moshi_ttt.core.registry import default_registry

    registry = default_registry()
    console = _console()
    reports = []
    with computing(parameters=0):  # reference vectors are small
        for path in verifying.expand(paths):
            reports.append(verifying.verify_file(path, registry))
            console.print(verifying.render(reports[-1], every=show_all))
    console.print(verifying.summary(reports))
    if not all(report.passed for report in reports):
        raise typer.Exit(EXIT_FAILED)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether ``error`` is an interruption, or was raised by code that met one and made another error of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _console() -> Console:
    from rich.console import Console

    # A pipe or a log has no width of its own; 80 columns would cut the tables.
    return Console(width=None if sys.stdout.isatty() else 110)


def _errors() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    print(f"Warning: {message}", file=file or sys.stderr)


def main() -> None:
    """The console entry point."""
    prepare_environment(os.environ)  # before anything imports torch or NumPy
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter shows a question mark for it
            stream.reconfigure(errors="replace")
    command = typer.main.get_command(app)  # until now a signal ends the process by itself
    # A termination is an interruption: what is half-written is cleared away on the way out.
    handle(stop_signals(), _interruption)
    try:
        command()
    finally:
        # The exit code is decided. Another signal of the stop that ended this would replace it.
        handle(stop_signals(), signal.SIG_IGN)


if __name__ == "__main__":
    main()
