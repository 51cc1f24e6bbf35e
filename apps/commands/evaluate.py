"""The subcommands of ``moshi-ttt evaluate``. Nothing heavy is imported until one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.apps.commands.evaluation_inputs import (
    Adapters,
    Batch,
    Channel,
    Config,
    Data,
    Label,
    LayoutOption,
    Out,
    Overwrite,
    Seconds,
    Seed,
    conditions_for,
    load,
    named_adapter,
    prepare,
)
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.system.platforms import check_file_names

app = typer.Typer(
    no_args_is_help=True,
    help="Compare adapters with the base model: the same code, the same recordings, 95 % intervals.",
)


Every = Annotated[
    int | None,
    typer.Option(
        "--every",
        min=1,
        help="Frames between two resets or exchanges of the memory. Default: the attention context, in whole segments.",
    ),
]
Segments = Annotated[
    int | None,
    typer.Option(
        "--segments",
        min=1,
        help="Segment length in frames. TTT state is carried across segments, attention is not. Default: stream token "
        "by token.",
    ),
]
Spans = Annotated[
    str | None,
    typer.Option(
        "--spans",
        metavar="LIST",
        help="Also report by position in the recordings: frames at which spans begin, such as 48,192,480,960.",
    ),
]


@app.command("long-context")
def long_context(
    ctx: typer.Context,
    config: Config,
    data: Data,
    out: Out,
    adapter: Adapters = None,
    layout: LayoutOption = "files",
    speaker_label: Label = None,
    moshi_channel: Channel = None,
    max_seconds: Seconds = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Window length in frames (12.5 a second).")] = 64,
    every: Every = None,
    segments: Segments = None,
    spans: Spans = None,
    batch_size: Batch = 4,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Loss by position over long recordings: updates on, updates off, memory reset, memory of another."""
    from moshi_ttt.evaluation import long_context as evaluation
    from moshi_ttt.evaluation.reporting import write_long_context
    from moshi_ttt.evaluation.subjects import CONDITIONS, refuse_uneven
    from moshi_ttt.system.output_folder import check_free, new_folder

    made_by = "moshi-ttt evaluate long-context"
    divided = evaluation.read_spans(spans, window) if spans is not None else ()
    check_free(out, made_by=made_by, overwrite=overwrite)
    if every is not None:
        refuse_uneven(CONDITIONS, every=every, segments=segments)  # before anything is loaded
    speakers = (speaker_label, moshi_channel)
    subjects, documents, facts, rate, _ = prepare(
        ctx, config, data, adapter, layout, max_seconds, speakers, threads
    )  # fmt: skip
    conditions = conditions_for(CONDITIONS, len(documents), batch_size)
    context, step = int(subjects[0].model.context or window), segments or 1
    options = evaluation.Options(
        window=window, every=every or -(-context // step) * step, batch_size=batch_size, conditions=conditions,
        segments=segments, spans=divided, seed=seed,
    )  # fmt: skip
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        result = evaluation.evaluate(subjects, documents, options)
        result.facts.update(facts)
        write_long_context(folder, result, made_by=made_by, frame_seconds=1 / rate)
    typer.echo((out / "report.md").read_text(encoding="utf-8"))


@app.command()
def recall(
    ctx: typer.Context,
    config: Config,
    data: Data,
    out: Out,
    adapter: Adapters = None,
    layout: LayoutOption = "files",
    speaker_label: Label = None,
    moshi_channel: Channel = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=2, help="Clip length in frames. Default: three times the attention context."),
    ] = None,
    pieces: Annotated[int, typer.Option("--pieces", min=1, help="Number of clips of each recording, at most.")] = 1,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "--volume",
            metavar="LIST",
            help="Also report recall and its cost at these volumes, such as 0,0.25,0.5,1 (0 is the base model).",
        ),
    ] = None,
    between: Annotated[
        list[str] | None,
        typer.Option(
            "--between",
            metavar="LIST",
            help="Instead: a clip, then so many other clips, then the clip again, for each number, such as 1,6,47.",
        ),
    ] = None,
    interludes: Annotated[
        str | None,
        typer.Option("--interludes", help="Recordings whose clips lie between, as for --data; none of those there."),
    ] = None,
    batch_size: Batch = 4,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Clips presented twice, and again after a clip of another recording: how much lower the later losses are."""
    from moshi_ttt.evaluation import between as far
    from moshi_ttt.evaluation import recall as evaluation
    from moshi_ttt.evaluation.between_report import write_between
    from moshi_ttt.evaluation.reporting import write_recall
    from moshi_ttt.evaluation.subjects import CONDITIONS
    from moshi_ttt.evaluation.volumes import read_volumes, refuse_volumes
    from moshi_ttt.system.output_folder import check_free, new_folder

    made_by = "moshi-ttt evaluate recall"
    volumes = read_volumes(volume) if volume else ()
    if volumes and not adapter:
        refuse_volumes((), volumes)
    counts = far.read_counts(between) if between else ()
    far.refuse_incomplete(counts, interludes, bool(adapter))
    check_free(out, made_by=made_by, overwrite=overwrite)
    subjects, documents, facts, rate, others = prepare(
        ctx, config, data, adapter, layout, None, (speaker_label, moshi_channel), threads, audio_for="recall",
        also=interludes,
    )  # fmt: skip
    frames = frames or 3 * int(subjects[0].model.context or 64)
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        if counts:
            options = far.BetweenOptions(
                counts=counts, frames=frames, batch_size=batch_size, pieces=pieces, volumes=volumes, seed=seed
            )
            lasting = far.evaluate(subjects, documents, others, options)
            lasting.facts.update(facts)
            write_between(folder, lasting, made_by=made_by, frame_seconds=1 / rate)
        else:
            result = evaluation.evaluate(
                subjects, documents, frames=frames, conditions=conditions_for(CONDITIONS, len(documents), batch_size),
                batch_size=batch_size, pieces=pieces, volumes=volumes, seed=seed,
            )  # fmt: skip
            result.facts.update(facts)
            write_recall(folder, result, made_by=made_by)
    typer.echo((out / "report.md").read_text(encoding="utf-8"))


@app.command("inner-loop")
def inner_loop(
    ctx: typer.Context,
    config: Config,
    data: Data,
    out: Out,
    adapter: Adapters = None,
    layout: LayoutOption = "files",
    speaker_label: Label = None,
    moshi_channel: Channel = None,
    max_seconds: Seconds = 120.0,
    smooth: Annotated[int, typer.Option("--smooth", min=1, help="Frames of the running mean in the figures.")] = 32,
    batch_size: Batch = 4,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Inner loss by position, layer and head: initial weights, before and after each update, and the mean target."""
    from moshi_ttt.evaluation import inner_loop as evaluation
    from moshi_ttt.system.output_folder import check_free, new_folder
    from moshi_ttt.system.report.writer import write_metrics

    made_by = "moshi-ttt evaluate inner-loop"
    check_free(out, made_by=made_by, overwrite=overwrite)
    check_file_names(named_adapter(text)[0] for text in adapter or [])  # each gets a folder
    speakers = (speaker_label, moshi_channel)
    subjects, documents, facts, rate, _ = prepare(
        ctx, config, data, adapter, layout, max_seconds, speakers, threads
    )  # fmt: skip
    remembering = [subject for subject in subjects if subject.injection is not None]
    if not remembering:
        raise ConfigError("The base model has no inner loop. Give an adapter that has blocks, as in --adapter ttt=RUN.")
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        for subject in remembering:
            result = evaluation.evaluate(subject, documents, batch_size=batch_size, smooth=smooth)
            result.facts.update({key: value for key, value in facts.items() if key != "subjects"} | subject.facts)
            place = folder if len(remembering) == 1 else folder / subject.name
            place.mkdir(exist_ok=True)
            evaluation.write_inner_loop(place, result, made_by=made_by, frame_seconds=1 / rate)
        if len(remembering) > 1:
            listed = {"made_by": made_by, "subjects": [subject.name for subject in remembering]}
            write_metrics(folder, listed)
        reports = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("report.md"))]
    typer.echo("\n".join(reports))


@app.command("zero-shot")
def zero_shot(
    ctx: typer.Context,
    config: Config,
    dataset: Annotated[str, typer.Option("--dataset", help="swuggy, sblimp, storycloze, topic-storycloze, or csv.")],
    source: Annotated[Path, typer.Option("--source", **PATH, help="Folder of the data set; for csv, the file.")],
    out: Out,
    adapter: Adapters = None,
    normalisation: Annotated[str, typer.Option("--normalisation", help="Compare nats/token, or sum.")] = "token",
    codebooks: Annotated[str, typer.Option("--codebooks", help="Score all, or semantic (the first).")] = "all",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Share of pairs in which the right recording is more likely: spoken words, sentences, endings of stories."""
    from typing import cast, get_args

    from moshi_ttt.evaluation import zero_shot as evaluation
    from moshi_ttt.evaluation.pairs import read_pairs
    from moshi_ttt.evaluation.zero_shot_report import write_zero_shot
    from moshi_ttt.hosts.moshi.host import MOSHI_HOST
    from moshi_ttt.system.output_folder import check_free, new_folder

    for option, given, allowed in (
        ("--normalisation", normalisation, get_args(evaluation.Normalisation)),
        ("--codebooks", codebooks, get_args(evaluation.Codebooks)),
    ):
        if given not in allowed:
            raise ConfigError(f"{option} {given!r}: allowed are {', '.join(allowed)}.")
    made_by = "moshi-ttt evaluate zero-shot"
    check_free(out, made_by=made_by, overwrite=overwrite)
    pairs = read_pairs(dataset, source)
    subjects, codec, facts = load(ctx, config, adapter, threads, audio_for="zero-shot")
    variants = {}
    for subject in subjects:
        named = {"updates on": True, "updates off": False} if subject.injection is not None else {"": True}
        for condition, updates in named.items():
            label = f"{subject.name}, {condition}" if condition else subject.name
            variants[label] = evaluation.ScoredModel(
                model=subject.model, host=MOSHI_HOST, updates=updates, present=subject.present
            )  # fmt: skip
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        results = evaluation.run(
            variants, codec, pairs, normalisation=cast("evaluation.Normalisation", normalisation),
            codebooks=cast("evaluation.Codebooks", codebooks), seed=seed,
        )  # fmt: skip
        write_zero_shot(folder, results, facts, made_by=made_by)
    typer.echo((out / "report.md").read_text(encoding="utf-8"))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(**PATH, help="Folders of long-context, recall or zero-shot.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Several evaluations of one base model in one table and one figure."""
    from moshi_ttt.evaluation.compare import read_results, write_comparison
    from moshi_ttt.system.output_folder import check_free, new_folder

    made_by = "moshi-ttt evaluate compare"
    check_free(out, made_by=made_by, overwrite=overwrite)
    results, facts = read_results(folders)
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        write_comparison(folder, results, facts, made_by=made_by)
    typer.echo((out / "report.md").read_text(encoding="utf-8"))
