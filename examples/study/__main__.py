"""``python examples/study``: train each variant and LoRA on a small Moshi, and report what memory is worth."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of a folder that is run, Python adds the folder alone

from moshi_ttt.apps.arguments import PATH
from moshi_ttt.apps.console import Command, run, show_warning

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command)
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
    unseen_valid: Annotated[
        list[Path] | None,
        typer.Option("--unseen-valid", **PATH, help="The same, of voices for validation alone; may be repeated."),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, help="A seed; may be repeated. The first is for validation. Default: 0, 1, 2."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", **PATH, help="Folder of the results of seeds; a seed that is there is not run. OUT/results."
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option("--stage", help="train, validate, test, report; may be repeated. Default: all."),
    ] = None,
    at_once: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Processor threads of each run; one if left out.")
    ] = None,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="The best arms on the tiny Moshi that ships, with one seed.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Very small: shows that everything runs.")] = False,
) -> None:
    """Train each variant and LoRA on a small Moshi with a short attention, and report what memory is worth.

    It takes about an hour a seed. After an interruption, the same command resumes. The report is in OUT/report.
    """
    warnings.showwarning = show_warning
    from study import plan
    from study.command import STAGES, make

    scale = replace(plan.SMOKE if smoke else plan.FULL, shipped=shipped)
    if shipped or seeds:
        scale = replace(scale, seeds=tuple(seeds or (0,)))
    chosen = tuple(stages or STAGES)
    report = make(
        out, known=known, unseen_valid=unseen_valid or [], unseen=unseen or [],
        scale=scale, arms=plan.OF_SHIPPED if shipped else plan.ARMS, at_once=at_once, threads=threads,
        say=lambda text: typer.echo(text), results=results, stages=chosen,
    )  # fmt: skip
    if "report" in chosen:
        typer.echo((report / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(app)
