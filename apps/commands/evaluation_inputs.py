"""What the evaluations share: the options that name the model and the recordings, and the loading of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moshi_ttt.apps.arguments import PATH
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.paths import user_path
from moshi_ttt.system.threads import computing, largest

if TYPE_CHECKING:
    from moshi_ttt.data.codec import SpeechCodec
    from moshi_ttt.evaluation.documents import Document, Layout
    from moshi_ttt.evaluation.subjects import Condition, Subject

Config = Annotated[str, typer.Argument(help="A config that names the base model: a YAML file, or a packaged one.")]
Data = Annotated[str, typer.Option("--data", "-d", help="A manifest, a folder of shards, or a folder of recordings.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="NAME=FOLDER of an adapter, or of a checkpoint that holds one; repeatable."),
]
Out = Annotated[Path, typer.Option("--out", "-o", **PATH, help="Folder to write. It must be new, or empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out if this command made it.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="Layout of a folder of recordings: files, or librilight.")]
Label = Annotated[
    str | None,
    typer.Option(
        "--speaker-label", help="Label of Moshi's words in the transcripts. Default: the config's, or SPEAKER_MAIN."
    ),
]
Channel = Annotated[
    str | None,
    typer.Option(
        "--moshi-channel", help="Moshi's channel in stereo recordings, left or right. Default: the config's, or left."
    ),
]
Seconds = Annotated[
    float | None, typer.Option("--max-seconds", min=0.1, help="Use only the first seconds of each recording.")
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Recordings in a batch.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the bootstrap.")]


def conditions_for(known: tuple[Condition, ...], documents: int, batch_size: int) -> tuple[Condition, ...]:
    """All of them; memory can be exchanged only between two recordings of a batch."""
    if documents > 1 and batch_size > 1:
        return known
    return tuple(condition for condition in known if condition != "memory of another")


def prepare(
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
    ``load``.
    """
    from dataclasses import replace
    from typing import cast

    from moshi_ttt.configs.reading import read_speakers
    from moshi_ttt.evaluation.documents import read_documents

    if layout not in ("files", "librilight"):
        raise ConfigError(f"--layout {layout!r}: allowed are files and librilight.")
    label, side = read_speakers(config, *speakers)
    subjects, codec, facts = load(ctx, config, adapters, threads, audio_for=audio_for)
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


def load(
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
    named = [named_adapter(text) for text in adapters or []]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = SpeechCodec.load(host, device, require=require)  # what does not fit is refused before weights are read
    subjects = load_subjects(host, named, registry, device)
    ctx.with_resource(computing(largest(subjects[0].model, codec.mimi), threads))
    return subjects, codec, {"base model": host.described, "subjects": {each.name: each.facts for each in subjects}}


def named_adapter(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--adapter {text!r}: write NAME=FOLDER, as in ttt=runs/checkpoints/checkpoint_000150.")
    return name, user_path(folder)
