"""``moshi-ttt train``: fine-tune Moshi, on one process or on many."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from moshi_ttt.apps.console import console, errors, interruption, was_interrupted
from moshi_ttt.system.interruption import EXIT_STOPPED, StopRequest

if TYPE_CHECKING:
    from moshi_ttt.training.step import Outcome


def train(
    config: Annotated[str, typer.Argument(help="A training config: a YAML file, or the name of a packaged config.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options to change, such as optim.lr=1e-5 resume=true."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Show what would be trained and the memory it takes, and exit. Reads no weights."),
    ] = False,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="With --plan: number of ranks that share the model.")
    ] = 1,
) -> None:
    """Fine-tune Moshi: TTT blocks, LoRA, or everything, on one process or on many.

    Several processes: torchrun --nproc-per-node 8 -m moshi_ttt train CONFIG. Ctrl-C or a termination signal saves a
    checkpoint and ends the run; resume=true continues from it.
    """
    with StopRequest(final=(interruption,)) as stop:
        try:
            outcome = _train(config, overrides or [], stop, plan=plan, ranks=ranks)
        except (Exception, KeyboardInterrupt) as error:
            # Asked to stop, a rank leaves; one that is waiting for it meets an error of its own.
            if stop.started or not (stop.asked or was_interrupted(error)):
                raise
            errors().print("Stopped on request before the first step; there was nothing to save.")
            stopped = True
        else:
            stopped = outcome is not None and outcome.stopped
        if stopped:
            raise typer.Exit(EXIT_STOPPED)


def _train(config: str, overrides: list[str], stop: StopRequest, *, plan: bool, ranks: int) -> Outcome | None:
    """Train, or only show the plan."""
    from moshi_ttt.configs import settings as reading
    from moshi_ttt.core.registry import default_registry

    registry = default_registry()
    settings = reading.read_settings(config, overrides, registry)
    if plan:
        from moshi_ttt.training.plan_tables import render
        from moshi_ttt.training.planning import plan as plan_run

        console().print(render(plan_run(settings, registry, ranks=ranks, activations=True)))
        return None
    from moshi_ttt.training.run import run

    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own writing of checkpoints
    return run(settings, registry, console(), stop)
