"""The subcommands of ``moshi-ttt evaluate``. Nothing heavy is imported until a subcommand runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH
from moshi_ttt.apps.commands.evaluation_inputs import (
    ModelOptions,
    OutputOptions,
    RecordingOptions,
    Seconds,
    Seed,
    conditions_for,
    load,
    named_adapter,
    prepare,
)
from moshi_ttt.apps.commands.manuals import MANUALS
from moshi_ttt.apps.commands.recall import run_recall
from moshi_ttt.apps.manual import documented, group_with
from moshi_ttt.apps.shared_options import renamed_option, with_shared_options
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.platforms import check_file_names

app = typer.Typer(
    cls=group_with(MANUALS["evaluate"]),
    no_args_is_help=True,
    help="Compare adapters with the base model on recordings.\n\n"
    "All models run the same code on the same recordings, and intervals are 95 %. Each subcommand writes a "
    "folder with report.md, figures, and every number in metrics.json.",
)


@documented(app, "long-context", MANUALS["evaluate long-context"])
@with_shared_options
def long_context(
    ctx: typer.Context,
    shared: RecordingOptions,
    max_seconds: Seconds = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Window length in frames (12.5 a second).")] = 64,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            min=1,
            help="Frames between two resets or exchanges of the memory. Default: the attention context, in whole "
            "segments.",
        ),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            "--segments",
            min=1,
            help="Segment length in frames. TTT state is carried across segments, attention is not. Default: stream "
            "token by token.",
        ),
    ] = None,
    spans: Annotated[
        str | None,
        typer.Option(
            "--spans",
            metavar="LIST",
            help="Also report by position in the recordings: frames at which spans begin, such as "
            "48,192,480,960. Default: no spans.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Report the loss by position in long recordings.

    It is reported with updates on and off, and with the memory reset or exchanged. A memory is exchanged when each
    recording of a batch gets the memory of another one.
    """
    from moshi_ttt.evaluation import long_context as evaluation
    from moshi_ttt.evaluation.models import CONDITIONS, refuse_uneven
    from moshi_ttt.evaluation.reporting import write_long_context

    made_by = "moshi-ttt evaluate long-context"
    divided = evaluation.read_spans(spans, window) if spans is not None else ()
    shared.check(made_by)
    if every is not None:
        refuse_uneven(CONDITIONS, every=every, segments=segments)  # before anything is loaded
    given = prepare(ctx, shared, max_seconds=max_seconds)
    context, step = int(given.models[0].model.context or window), segments or 1
    options = evaluation.Options(
        window=window, every=every or -(-context // step) * step, batch_size=shared.batch_size,
        conditions=conditions_for(CONDITIONS, len(given.documents), shared.batch_size), segments=segments,
        spans=divided, seed=seed,
    )  # fmt: skip
    with shared.new_folder(made_by) as folder:
        result = evaluation.evaluate(given.models, given.documents, options)
        result.facts.update(given.facts)
        write_long_context(folder, result, made_by=made_by, frame_seconds=1 / given.frame_rate)


@documented(app, "recall", MANUALS["evaluate recall"])
@with_shared_options
def recall(
    ctx: typer.Context,
    shared: RecordingOptions,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=2, help="Clip length in frames. Default: three times the attention context."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option("--clips", min=1, help="Largest number of clips of each recording. Default: 1.")
    ] = None,
    pieces: Annotated[int | None, typer.Option("--pieces", min=1, hidden=True)] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "--volume",
            metavar="LIST",
            help="Also report recall and its cost at these volumes, such as 0,0.25,0.5,1 (0 is the base model). "
            "Default: 1 alone.",
        ),
    ] = None,
    between: Annotated[
        list[str] | None,
        typer.Option(
            "--between",
            metavar="LIST",
            help="Report recall after other clips instead: their number, or several numbers, such as 1,6,47. "
            "Default: no other clips.",
        ),
    ] = None,
    interludes: Annotated[
        str | None,
        typer.Option(
            "--interludes",
            help="With --between: recordings of the other clips, as for --data, but none of those. Default: none.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Report how much lower the loss of a clip is when it is presented again.

    The second presentation follows the first directly, the third follows a clip of another recording.
    """
    from moshi_ttt.evaluation.between import read_counts, refuse_incomplete
    from moshi_ttt.evaluation.volumes import read_volumes, refuse_volumes

    clips = renamed_option("--pieces", pieces, "--clips", clips) or 1
    volumes = read_volumes(volume) if volume else ()
    if volumes and not shared.adapter:
        refuse_volumes((), volumes)
    counts = read_counts(between) if between else ()
    refuse_incomplete(counts, interludes, bool(shared.adapter))
    run_recall(
        ctx, shared, frames=frames, clips=clips, volumes=volumes, counts=counts, interludes=interludes, seed=seed
    )


@documented(app, "inner-loop", MANUALS["evaluate inner-loop"])
@with_shared_options
def inner_loop(
    ctx: typer.Context,
    shared: RecordingOptions,
    max_seconds: Seconds = 120.0,
    smooth: Annotated[int, typer.Option("--smooth", min=1, help="Frames of the running mean in the figures.")] = 32,
) -> None:
    """Report the inner loss by position, layer and head.

    It is measured at the initial weights, before and after each update, and for predicting the mean target.
    """
    from moshi_ttt.evaluation import inner_loop as evaluation
    from moshi_ttt.system.report.writer import write_metrics

    made_by = "moshi-ttt evaluate inner-loop"
    shared.check(made_by)
    check_file_names(named_adapter(text)[0] for text in shared.adapter or [])  # each gets a folder
    given = prepare(ctx, shared, max_seconds=max_seconds)
    with_blocks = [tested for tested in given.models if tested.injection is not None]
    if not with_blocks:
        raise ConfigError("The base model has no inner loop. Give an adapter that has blocks, as in --adapter ttt=RUN.")
    facts = {key: value for key, value in given.facts.items() if key != "subjects"}
    with shared.new_folder(made_by) as folder:
        for tested in with_blocks:
            result = evaluation.evaluate(tested, given.documents, batch_size=shared.batch_size, smooth=smooth)
            result.facts.update(facts | tested.facts)
            place = folder if len(with_blocks) == 1 else folder / tested.name
            place.mkdir(exist_ok=True)
            evaluation.write_inner_loop(place, result, made_by=made_by, frame_seconds=1 / given.frame_rate)
        if len(with_blocks) > 1:
            write_metrics(folder, {"made_by": made_by, "subjects": [tested.name for tested in with_blocks]})


@documented(app, "zero-shot", MANUALS["evaluate zero-shot"])
@with_shared_options
def zero_shot(
    ctx: typer.Context,
    shared: ModelOptions,
    dataset: Annotated[str, typer.Option("--dataset", help="swuggy, sblimp, storycloze, topic-storycloze, or csv.")],
    source: Annotated[Path, typer.Option("--source", **PATH, help="Folder of the data set; for csv, the file.")],
    normalization: Annotated[
        str | None, typer.Option("--normalization", help="What to compare: token (nats/token) or sum. Default: token.")
    ] = None,
    normalisation: Annotated[str | None, typer.Option("--normalisation", hidden=True)] = None,
    codebooks: Annotated[
        str, typer.Option("--codebooks", help="Codebooks to score: all, or semantic (the first).")
    ] = "all",
    seed: Seed = 0,
) -> None:
    """Report how often the right recording of a pair is the more likely one.

    Pairs are of spoken words, of sentences, or of endings of stories.
    """
    from typing import cast, get_args

    from moshi_ttt.evaluation import zero_shot as evaluation
    from moshi_ttt.evaluation.pairs import read_pairs
    from moshi_ttt.evaluation.zero_shot_report import write_zero_shot
    from moshi_ttt.hosts.moshi.host import MOSHI_HOST

    normalization = renamed_option("--normalisation", normalisation, "--normalization", normalization) or "token"
    for option, given, allowed in (
        ("--normalization", normalization, get_args(evaluation.Normalization)),
        ("--codebooks", codebooks, get_args(evaluation.Codebooks)),
    ):
        if given not in allowed:
            raise ConfigError(f"{option} {given!r}: allowed are {', '.join(allowed)}.")
    made_by = "moshi-ttt evaluate zero-shot"
    shared.check(made_by)
    pairs = read_pairs(dataset, source)
    models, codec, facts = load(ctx, shared, audio_for="zero-shot")
    with shared.new_folder(made_by) as folder:
        results = evaluation.run(
            evaluation.with_and_without_updates(models, MOSHI_HOST), codec, pairs,
            normalization=cast("evaluation.Normalization", normalization),
            codebooks=cast("evaluation.Codebooks", codebooks), seed=seed,
        )  # fmt: skip
        write_zero_shot(folder, results, facts, made_by=made_by)


@documented(app, "compare", MANUALS["evaluate compare"])
@with_shared_options
def compare(
    shared: OutputOptions,
    folders: Annotated[
        list[Path], typer.Argument(**PATH, help="Folders that long-context, recall or zero-shot wrote.")
    ],
) -> None:
    """Put several evaluations of one base model into one table and one figure.

    All of them have to be results of long-context, of recall, or of zero-shot.
    """
    from moshi_ttt.evaluation.compare import read_results, write_comparison

    made_by = "moshi-ttt evaluate compare"
    shared.check(made_by)
    results, facts = read_results(folders)
    with shared.new_folder(made_by) as folder:
        write_comparison(folder, results, facts, made_by=made_by)
