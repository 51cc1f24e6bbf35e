"""What the evaluations share: the options that name the model and the recordings, and the loading of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moshi_ttt.apps.arguments import PATH, Threads
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.paths import user_path
from moshi_ttt.system.threads import computing, largest

if TYPE_CHECKING:
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.evaluation.documents import Document, Layout
    from moshi_ttt.evaluation.models import Condition, ModelUnderTest

Seconds = Annotated[
    float | None,
    typer.Option("--max-seconds", min=0.1, help="Use only the first seconds of each recording. Default: all."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the bootstrap.")]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The options of every command that writes a folder with a report."""

    out: Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if this command made it.")] = False

    def check(self, made_by: str) -> None:
        """Raise OutputError where the folder cannot be written: before anything is loaded."""
        from moshi_ttt.system.output_folder import check_free

        check_free(self.out, made_by=made_by, overwrite=self.overwrite)

    @contextmanager
    def new_folder(self, made_by: str) -> Iterator[Path]:
        """The folder to write into. It becomes ``out`` when the context ends well; then its reports are printed."""
        from moshi_ttt.system.output_folder import new_folder

        with new_folder(self.out, made_by=made_by, overwrite=self.overwrite) as folder:
            yield folder
            reports = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("report.md"))]
        typer.echo("\n".join(reports))


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OutputOptions):
    """The options of every evaluation of models."""

    config: Annotated[str, typer.Argument(help="A config that names the base model: a YAML file, or a packaged one.")]
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="NAME=FOLDER of an adapter, or of a checkpoint that holds one; repeatable. Default: none.",
        ),
    ] = None
    threads: Threads = None


@dataclass(frozen=True, kw_only=True)
class RecordingOptions(ModelOptions):
    """The options of every evaluation on recordings."""

    data: Annotated[
        str, typer.Option("--data", "-d", help="A manifest, a folder of shards, or a folder of recordings.")
    ]
    layout: Annotated[str, typer.Option("--layout", help="Layout of a folder of recordings: files, or librilight.")] = (
        "files"
    )
    speaker_label: Annotated[
        str | None,
        typer.Option(
            "--speaker-label", help="Label of Moshi's words in the transcripts. Default: the config's, or SPEAKER_MAIN."
        ),
    ] = None
    moshi_channel: Annotated[
        str | None,
        typer.Option(
            "--moshi-channel",
            help="Moshi's channel in stereo recordings: left or right. Default: the config's, or left.",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Recordings in a batch.")] = 4


@dataclass(frozen=True)
class Prepared:
    """What an evaluation on recordings needs.

    Attributes:
        models: the base model, then the adapters.
        documents: the recordings of ``--data``.
        others: the recordings of another option, where a command has one.
        facts: what a report says of them.
        frame_rate: frames a second.
    """

    models: list[ModelUnderTest]
    documents: list[Document]
    others: list[Document]
    facts: dict[str, Any]
    frame_rate: float


def conditions_for(known: tuple[Condition, ...], documents: int, batch_size: int) -> tuple[Condition, ...]:
    """All conditions, without ``memory of another`` where no batch has two recordings that could exchange memory."""
    if documents > 1 and batch_size > 1:
        return known
    return tuple(condition for condition in known if condition != "memory of another")


def prepare(
    ctx: typer.Context,
    options: RecordingOptions,
    *,
    max_seconds: float | None = None,
    audio_for: str | None = None,
    interludes: str | None = None,
) -> Prepared:
    """Load the models and read the recordings; ``interludes`` names others. ``audio_for`` as in ``load``."""
    from typing import cast

    from moshi_ttt.configs.reading import read_speakers
    from moshi_ttt.evaluation.documents import read_documents

    if options.layout not in ("files", "librilight"):
        raise ConfigError(f"--layout {options.layout!r}: allowed are files and librilight.")
    label, side = read_speakers(options.config, options.speaker_label, options.moshi_channel)
    models, codec, facts = load(ctx, options, audio_for=audio_for)
    codec = replace(codec, speaker_label=label, moshi_channel=side)
    rate = float(codec.mimi.frame_rate)
    documents, others = (
        [] if named is None else read_documents(
            named, codec, layout=cast("Layout", options.layout),
            transcripts="required" if models[0].model.depformer is None else "optional",  # text is all it predicts
            limit=None if max_seconds is None else max(1, round(max_seconds * rate)),
            report=lambda line: typer.echo(line, err=True),
        )
        for named in (options.data, interludes)
    )  # fmt: skip
    facts = {**facts, "data": options.data, **({"interludes from": interludes} if interludes else {})}
    return Prepared(models, documents, others, facts, rate)


def load(
    ctx: typer.Context, options: ModelOptions, *, audio_for: str | None = None
) -> tuple[list[ModelUnderTest], SpeechCodec, dict[str, Any]]:
    """The base model and the adapters, the codec, and what a report says of them.

    The rest of the command computes with ``options.threads``, or as many as the models are worth. ``audio_for`` is the
    evaluation that needs a model which predicts audio.
    """
    import torch

    from moshi_ttt.configs.reading import read_config
    from moshi_ttt.core.registry import default_registry
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.evaluation.models import load_models
    from moshi_ttt.hosts.moshi.compatibility import require_audio, require_unconditioned
    from moshi_ttt.hosts.moshi.host import MoshiHostConfig

    def require(model: Any, name: str) -> None:
        require_unconditioned(model, name)
        if audio_for is not None:
            require_audio(model, name, audio_for)

    registry = default_registry()
    host = read_config(options.config, registry=registry).host
    if not isinstance(host, MoshiHostConfig):
        raise ConfigError(f"Evaluations are written for the host 'moshi', and {options.config} names {host.name!r}.")
    named = [named_adapter(text) for text in options.adapter or []]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpeechCodec.load(host, device, require=require)  # what does not fit is refused before weights are read
    models = load_models(host, named, registry, device)
    ctx.with_resource(computing(largest(models[0].model, codec.mimi), options.threads))
    return models, codec, {"base model": host.described, "subjects": {each.name: each.facts for each in models}}


def named_adapter(text: str) -> tuple[str, Path]:
    """The name and the folder of ``--adapter NAME=FOLDER``. Raises ConfigError."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter {text!r}: write NAME=FOLDER, as in ttt=runs/checkpoints/checkpoint_000150.")
    return name, user_path(folder)
