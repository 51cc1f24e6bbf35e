"""The subcommands of ``moshi-ttt evaluate``. Nothing heavy is imported until one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.paths import user_path
from moshi_ttt.system.output_folder import METRICS
from moshi_ttt.system.platforms import check_file_names
from moshi_ttt.system.threads import computing, largest

if TYPE_CHECKING:
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.evaluation.documents import Document, Layout
    from moshi_ttt.evaluation.subjects import Condition, Subject

app = typer.Typer(
    no_args_is_help=True,
    help="Does memory help? The base model and adapters by the same code on the same recordings, with intervals.",
)
Config = Annotated[str, typer.Argument(help="A config that names the base model: a YAML file, or a packaged one.")]
Data = Annotated[str, typer.Option("--data", "-d", help="A manifest, a folder of shards, or a folder of recordings.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="NAME=FOLDER of an adapter, or of a checkpoint that holds one; repeatable."),
]
Out = Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out if this command made it.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="Of a folder of recordings: files, or librilight.")]
Label = Annotated[
    str | None,
    typer.Option("--speaker-label", help="Of Moshi's words in the transcripts; the config's, or SPEAKER_MAIN."),
]
Channel = Annotated[
    str | None,
    typer.Option("--moshi-channel", help="Of stereo recordings, left or right; the config's, or left."),
]
Seconds = Annotated[float | None, typer.Option("--max-seconds", min=0.1, help="Hear so much of each recording.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Recordings heard at a time.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of the bootstrap.")]


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
    window: Annotated[int, typer.Option("--window", min=1, help="Frames of a window (12.5 are a second).")] = 64,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            min=1,
            help="Frames between resets or exchanges; the context if left out, in whole segments where there are some.",
        ),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            "--segments",
            min=1,
            help="Hear forward passes of so many frames, memory carried, attention restarted; token by token if left "
            "out.",
        ),
    ] = None,
    spans: Annotated[
        str | None,
        typer.Option(
            "--spans",
            metavar="LIST",
            help="Also report by position in the recordings, from these frames on, such as 48,192,480,960.",
        ),
    ] = None,
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
    subjects, documents, facts, rate, _ = _prepare(
        ctx, config, data, adapter, layout, max_seconds, speakers, threads
    )  # fmt: skip
    conditions = _conditions(CONDITIONS, len(documents), batch_size)
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
        int | None, typer.Option("--frames", min=2, help="Of a piece; three contexts if left out.")
    ] = None,
    pieces: Annotated[int, typer.Option("--pieces", min=1, help="Heard of each recording, at most.")] = 1,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "--volume",
            metavar="LIST",
            help="Recall against cost at volumes such as 0,0.25,0.5,1 (0 is the base).",
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
    """Pieces of recordings heard twice, and again after one of another: what the later hearings save."""
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
    subjects, documents, facts, rate, others = _prepare(
        ctx, config, data, adapter, layout, None, (speaker_label, moshi_channel), threads, audio_for="recall",
        also=interludes,
    )  # fmt: skip
    frames = frames or 3 * int(subjects[0].model.context or 64)
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        if counts:
            options = far.Options(
                counts=counts, frames=frames, batch_size=batch_size, pieces=pieces, volumes=volumes, seed=seed
            )
            lasting = far.evaluate(subjects, documents, others, options)
            lasting.facts.update(facts)
            write_between(folder, lasting, made_by=made_by, frame_seconds=1 / rate)
        else:
            result = evaluation.evaluate(
                subjects, documents, frames=frames, conditions=_conditions(CONDITIONS, len(documents), batch_size),
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
    smooth: Annotated[int, typer.Option("--smooth", min=1, help="Frames of the plots' running mean.")] = 32,
    batch_size: Batch = 4,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Inner loss by position, layer and head: initial weights, before and after each update, and the mean target."""
    from moshi_ttt.evaluation import inner_loop as evaluation
    from moshi_ttt.system.output_folder import check_free, new_folder

    made_by = "moshi-ttt evaluate inner-loop"
    check_free(out, made_by=made_by, overwrite=overwrite)
    check_file_names(_adapter(text)[0] for text in adapter or [])  # each gets a folder
    speakers = (speaker_label, moshi_channel)
    subjects, documents, facts, rate, _ = _prepare(
        ctx, config, data, adapter, layout, max_seconds, speakers, threads
    )  # fmt: skip
    remembering = [subject for subject in subjects if subject.injection is not None]
    if not remembering:
        raise ConfigError(
            "There is no inner loop without blocks: give an adapter that has some, as in --adapter ttt=RUN."
        )
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        for subject in remembering:
            result = evaluation.evaluate(subject, documents, batch_size=batch_size, smooth=smooth)
            result.facts.update({key: value for key, value in facts.items() if key != "subjects"} | subject.facts)
            place = folder if len(remembering) == 1 else folder / subject.name
            place.mkdir(exist_ok=True)
            evaluation.write_inner_loop(place, result, made_by=made_by, frame_seconds=1 / rate)
        if len(remembering) > 1:
            listed = {"made_by": made_by, "subjects": [subject.name for subject in remembering]}
            (folder / METRICS).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        reports = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("report.md"))]
    typer.echo("\n".join(reports))


@app.command("zero-shot")
def zero_shot(
    ctx: typer.Context,
    config: Config,
    dataset: Annotated[str, typer.Option("--dataset", help="swuggy, sblimp, storycloze, topic-storycloze, or csv.")],
    source: Annotated[Path, typer.Option("--source", **PATH, help="The dataset's folder; for csv the file.")],
    out: Out,
    adapter: Adapters = None,
    normalisation: Annotated[str, typer.Option("--normalisation", help="Compare nats a token, or sum.")] = "token",
    codebooks: Annotated[str, typer.Option("--codebooks", help="all, or semantic (the first).")] = "all",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Share of pairs of recordings whose right one is likelier: spoken words, sentences, endings of stories."""
    from typing import cast, get_args

    from moshi_ttt.evaluation import zero_shot as evaluation
    from moshi_ttt.evaluation.pairs import read_pairs
    from moshi_ttt.evaluation.reporting import versions
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
    subjects, codec, facts = _load(ctx, config, adapter, threads, audio_for="zero-shot")
    variants = {}
    for subject in subjects:
        named = {"updates on": True, "updates off": False} if subject.injection is not None else {"": True}
        for condition, updates in named.items():
            label = f"{subject.name}, {condition}" if condition else subject.name
            variants[label] = evaluation.Variant(
                model=subject.model, host=MOSHI_HOST, updates=updates, present=subject.present
            )  # fmt: skip
    with new_folder(out, made_by=made_by, overwrite=overwrite) as folder:
        results = evaluation.run(
            variants, codec, pairs, normalisation=cast("evaluation.Normalisation", normalisation),
            codebooks=cast("evaluation.Codebooks", codebooks), seed=seed,
        )  # fmt: skip
        values = {"made_by": made_by, "versions": versions(), **facts, **results.to_json(scores=True)}
        (folder / METRICS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(results.to_markdown() + "\n", encoding="utf-8")
    typer.echo((out / "report.md").read_text(encoding="utf-8"))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(**PATH, help="Folders that the other evaluations wrote.")],
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


def _conditions(known: tuple[Condition, ...], documents: int, batch_size: int) -> tuple[Condition, ...]:
    """All of them; memory can be exchanged only where two recordings are heard at a time."""
    if documents > 1 and batch_size > 1:
        return known
    return tuple(condition for condition in known if condition != "memory of another")


def _prepare(
    ctx: typer.Context,
    config: str,
    data: str,
    adapters: list[str] | None,
    layout: str,
    max_seconds: float | None,
    speakers: tuple[str | None, str | None],
    threads: int | None,
    audio_for: str | None = None,
    also: str | None = None,
) -> tuple[list[Subject], list[Document], dict[str, Any], float, list[Document]]:
    """Everything that is loaded, what a report says of it, frames a second, and the recordings that ``also`` names.

    ``speakers``: the label of Moshi's words and Moshi's channel, where the command line says them; ``audio_for`` as in
    ``_load``.
    """
    from dataclasses import replace
    from typing import cast

    from moshi_ttt.configs.reading import read_speakers
    from moshi_ttt.evaluation.documents import read_documents

    if layout not in ("files", "librilight"):
        raise ConfigError(f"--layout {layout!r}: allowed are files and librilight.")
    label, side = read_speakers(config, *speakers)
    subjects, codec, facts = _load(ctx, config, adapters, threads, audio_for=audio_for)
    codec = replace(codec, speaker_label=label, moshi_channel=side)
    rate = float(codec.mimi.frame_rate)
    documents, others = (
        [] if named is None else read_documents(
            named, codec, layout=cast("Layout", layout),
            transcripts="required" if subjects[0].model.depformer is None else "optional",  # text is all it predicts
            limit=None if max_seconds is None else max(1, round(max_seconds * rate)),
            report=lambda line: typer.echo(line, err=True),
        )
        for named in (data, also)
    )  # fmt: skip
    return subjects, documents, {**facts, "data": data, **({"interludes from": also} if also else {})}, rate, others


def _load(
    ctx: typer.Context, config: str, adapters: list[str] | None, threads: int | None, *, audio_for: str | None = None
) -> tuple[list[Subject], SpeechCodec, dict[str, Any]]:
    """The base model and the adapters, the codec, and what a report says of them.

    The rest of the command computes with ``threads``, or as many as the models are worth. ``audio_for`` is the
    evaluation that needs a model which predicts audio.
    """
    import torch

    from moshi_ttt.configs.reading import read_config
    from moshi_ttt.core.registry import default_registry
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.evaluation.subjects import load_subjects
    from moshi_ttt.hosts.moshi.fit import require_audio, require_unconditioned
    from moshi_ttt.hosts.moshi.host import MoshiHostConfig

    def require(model: Any, name: str) -> None:
        require_unconditioned(model, name)
        if audio_for is not None:
            require_audio(model, name, audio_for)

    registry = default_registry()
    host = read_config(config, registry=registry).host
    if not isinstance(host, MoshiHostConfig):
        raise ConfigError(f"Evaluations are written for the host 'moshi', and {config} names {host.name!r}.")
    named = [_adapter(text) for text in adapters or []]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpeechCodec.load(host, device, require=require)  # what does not fit is refused before weights are read
    subjects = load_subjects(host, named, registry, device)
    ctx.with_resource(computing(largest(subjects[0].model, codec.mimi), threads))
    return subjects, codec, {"base model": host.described, "subjects": {each.name: each.facts for each in subjects}}


def _adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter {text!r}: write NAME=FOLDER, as in ttt=runs/checkpoints/checkpoint_000150.")
    return name, user_path(folder)
