"""``moshi-ttt quickstart``, from config to report: everything in order, each part in a module of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moshi_ttt.apps.audio import decode, write_wav
from moshi_ttt.apps.config_files import read_config
from moshi_ttt.apps.options import StreamConfig, TrainConfig
from moshi_ttt.apps.output_folder import check_free, new_folder
from moshi_ttt.apps.quickstart import evaluate as evaluating
from moshi_ttt.apps.quickstart import plots, report
from moshi_ttt.apps.quickstart.data import Codec, Recording, Speech, load_speech
from moshi_ttt.apps.quickstart.stream import Streamed, compare_with_training, listen
from moshi_ttt.apps.quickstart.train import Segments, train
from moshi_ttt.core.adapter import save_adapter
from moshi_ttt.core.config import TTTConfig
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.injection import Injection, Plan, make_plan
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.host import MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import MoshiBundle, resolve_repo
from moshi_ttt.hosts.moshi.tiny import speech_files

MADE_BY = "moshi-ttt quickstart"
COMPARED_FRAMES = 150
"""Frames over which streaming is compared with training."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for; None means what the config says."""

    out: Path
    config: str = "quickstart"
    steps: int | None = None
    audio: Path | None = None
    seed: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The config with the request's changes."""

    ttt: TTTConfig
    host: MoshiHostConfig
    train: TrainConfig
    stream: StreamConfig


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is loaded and checked before the first minute is spent."""

    settings: Settings
    model: Any
    codec: Codec
    speech: Speech
    streamed: Recording
    plan: Plan
    segments: Segments


def run(request: Request, console: Console) -> Path:
    """Do it all and return the folder. Raises MoshiTTTError; the folder is then as it was before.

    Every input is checked before training starts.
    """
    started = time.perf_counter()
    check_free(request.out, made_by=MADE_BY, overwrite=request.overwrite)
    settings = read_settings(request)
    with new_folder(request.out, made_by=MADE_BY, overwrite=request.overwrite) as folder:
        setup = prepare(settings, request.audio)
        seconds = {"prepare": time.perf_counter() - started}
        console.print(report.introduction(setup))
        results = measure(setup, folder, console, seconds)
        seconds["total"] = time.perf_counter() - started
        report.write(folder, setup, results, seconds, made_by=MADE_BY)
    console.print(report.conclusion(request.out, setup, results, seconds))
    return request.out


def read_settings(request: Request) -> Settings:
    """Config and command line together. Raises ConfigError."""
    config = read_config(request.config)
    if not isinstance(config.host, MoshiHostConfig):
        raise ConfigError(f"The quickstart is written for the host 'moshi', the config names {config.host.name!r}.")
    if not config.ttt:
        raise ConfigError("The config has no blocks (ttt: []), so there is nothing to train. Add an entry to ttt.")
    seeds = {} if request.seed is None else {"seed": request.seed}
    steps = {} if request.steps is None else {"steps": request.steps}
    return Settings(
        ttt=config.model_copy(update=seeds),
        host=config.host,
        train=cast(TrainConfig, config.extra["train"]).model_copy(update=steps | seeds),
        stream=cast(StreamConfig, config.extra["stream"]).model_copy(update=seeds),
    )


def prepare(settings: Settings, audio: Path | None) -> Setup:
    """Load and check everything; the model has no blocks yet."""
    registry = default_registry()
    host = registry.host(settings.host.name)
    bundle: MoshiBundle = resolve_repo(settings.host.hf_repo, revision=settings.host.revision)
    model: Any = host.load(settings.host)
    policy = registry.policy(settings.ttt.precision)
    plan = make_plan(model, host, settings.ttt.ttt, policy=policy, registry=registry, seed=settings.ttt.seed)
    codec = Codec.of(model, bundle.load_mimi(), bundle.tokenizer())
    streamed = None if audio is None else codec.recording(audio)
    speech = load_speech(codec, speech_files())
    return Setup(
        settings=settings, model=model, codec=codec, speech=speech, plan=plan,
        streamed=streamed or speech.held_out, segments=Segments(codec, speech, settings.train),
    )  # fmt: skip


def measure(setup: Setup, folder: Path, console: Console, seconds: dict[str, float]) -> report.Results:
    """Train, evaluate and stream; writes the adapter, the generated audio and the plots into ``folder``."""
    model, host, settings, codec = setup.model, setup.plan.host, setup.settings, setup.codec
    document = codec.document([setup.speech.held_out])
    frame_seconds = 1 / codec.mimi.frame_rate

    with _timed(seconds, "evaluate"):
        base = evaluating.evaluate(model, host, document, name="base model")
    injection: Injection = setup.plan.apply(model)
    with _timed(seconds, "train"), _bar(console, "training the blocks", settings.train.steps) as advance:
        log = train(
            model, injection, setup.segments, settings.train,
            on_step=lambda step, loss: advance(step, f"loss {loss:.3f}"),
        )  # fmt: skip
    save_adapter(injection, folder / "adapter", training_step=settings.train.steps)
    with _timed(seconds, "evaluate"):
        curves = (
            base,
            evaluating.evaluate(model, host, document, name="updates off", updates=False),
            evaluating.evaluate(model, host, document, name="updates on"),
        )
    with _timed(seconds, "compare"):
        agreement = compare_with_training(model, document[:, :COMPARED_FRAMES])
    audio = setup.streamed.audio[:, : max(2, round(settings.stream.seconds * codec.mimi.frame_rate))]
    with _timed(seconds, "stream"), _bar(console, "streaming a recording", audio.shape[1]) as advance:
        streamed: Streamed = listen(
            model, codec, audio, settings.stream,
            on_frame=lambda frame: advance(frame, f"{frame * frame_seconds:.0f} s heard"),
        )  # fmt: skip
    with _timed(seconds, "plots"):
        if streamed.tokens.shape[1]:
            write_wav(folder / "generated.wav", decode(codec.mimi, streamed.tokens[1:]), int(codec.mimi.sample_rate))
        plots.plot_positions(
            folder / "loss_by_position.png", curves, frame_seconds=frame_seconds, context=model.context
        )
        plots.plot_training(folder / "training.png", log)
        plots.plot_state(folder / "state.png", streamed.change, frame_seconds=frame_seconds)
    return report.Results(
        training=log, curves=curves, agreement=agreement, streamed=streamed,
        differences=(
            evaluating.compare(curves[2], curves[1]),
            evaluating.compare(curves[2], curves[0]),
        ),
    )  # fmt: skip


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)
