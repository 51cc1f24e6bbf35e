"""``moshi-ttt evaluate recall``: load the models and the recordings, evaluate, and write the report."""

from __future__ import annotations

import typer

from moshi_ttt.apps.commands.evaluation_inputs import RecordingOptions, conditions_for, prepare

MADE_BY = "moshi-ttt evaluate recall"


def run_recall(
    ctx: typer.Context,
    shared: RecordingOptions,
    *,
    frames: int | None,
    clips: int,
    volumes: tuple[float, ...],
    counts: tuple[int, ...],
    interludes: str | None,
    seed: int,
) -> None:
    """Present clips twice and after another clip or, where ``counts`` are given, after so many other clips."""
    from moshi_ttt.evaluation import between, recall
    from moshi_ttt.evaluation.between_report import write_between
    from moshi_ttt.evaluation.models import CONDITIONS
    from moshi_ttt.evaluation.reporting import write_recall

    shared.check(MADE_BY)
    given = prepare(ctx, shared, audio_for="recall", interludes=interludes)
    frames = frames or 3 * int(given.models[0].model.context or 64)
    with shared.new_folder(MADE_BY) as folder:
        if counts:
            options = between.BetweenOptions(
                counts=counts, frames=frames, batch_size=shared.batch_size, clips=clips, volumes=volumes, seed=seed
            )
            after = between.evaluate(given.models, given.documents, given.others, options)
            after.facts.update(given.facts)
            write_between(folder, after, made_by=MADE_BY, frame_seconds=1 / given.frame_rate)
        else:
            result = recall.evaluate(
                given.models, given.documents, frames=frames, batch_size=shared.batch_size, clips=clips,
                conditions=conditions_for(CONDITIONS, len(given.documents), shared.batch_size), volumes=volumes,
                seed=seed,
            )  # fmt: skip
            result.facts.update(given.facts)
            write_recall(folder, result, made_by=MADE_BY)
