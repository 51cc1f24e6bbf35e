"""What a quickstart needs, loaded and checked before the first minute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moshi_ttt.apps.quickstart.data import Codec, Recording, Speech, load_speech
from moshi_ttt.apps.quickstart.train import Segments
from moshi_ttt.configs.reading import read_config
from moshi_ttt.configs.sections import StreamConfig, TrainConfig
from moshi_ttt.core.config import TTTConfig
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.injection import Plan, make_plan
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.fit import require_unconditioned
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import MoshiBundle
from moshi_ttt.hosts.moshi.tiny import speech_files


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for; None means what the config says."""

    out: Path
    config: str = "quickstart"
    steps: int | None = None
    audio: Path | None = None
    seed: int | None = None
    overwrite: bool = False
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The config with the request's changes."""

    ttt: TTTConfig
    host: MoshiHostConfig
    train: TrainConfig
    stream: StreamConfig


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is loaded and checked before the first minute is spent."""

    settings: QuickstartSettings
    model: Any
    codec: Codec
    speech: Speech
    streamed: Recording
    plan: Plan
    segments: Segments


def read_settings(request: Request) -> QuickstartSettings:
    """Config and command line together. Raises ConfigError."""
    config = read_config(request.config)
    if not config.extra:
        raise ConfigError(f"{request.config} is the config of a training run: use `moshi-ttt train {request.config}`.")
    if not isinstance(config.host, MoshiHostConfig):
        raise ConfigError(f"The quickstart is written for the host 'moshi', the config names {config.host.name!r}.")
    if not config.ttt:
        raise ConfigError("The config has no blocks (ttt: []), so there is nothing to train. Add an entry to ttt.")
    seeds = {} if request.seed is None else {"seed": request.seed}
    steps = {} if request.steps is None else {"steps": request.steps}
    return QuickstartSettings(
        ttt=config.model_copy(update=seeds),
        host=config.host,
        train=cast(TrainConfig, config.extra["train"]).model_copy(update=steps | seeds),
        stream=cast(StreamConfig, config.extra["stream"]).model_copy(update=seeds),
    )


def prepare(settings: QuickstartSettings, audio: Path | None) -> Setup:
    """Load and check everything; the model has no blocks yet."""
    registry = default_registry()
    host = registry.host(settings.host.name)
    bundle: MoshiBundle = settings.host.bundle()
    skeleton = MOSHI_HOST.skeleton(settings.host)
    require_unconditioned(skeleton, settings.host.hf_repo)
    codec = Codec.of(skeleton, bundle.load_mimi(), bundle.tokenizer())  # refused before the weights are read
    model: Any = host.load(settings.host)
    policy = registry.policy(settings.ttt.precision)
    plan = make_plan(model, host, settings.ttt.ttt, policy=policy, registry=registry, seed=settings.ttt.seed)
    streamed = None if audio is None else codec.recording(audio)
    speech = load_speech(codec, speech_files())
    return Setup(
        settings=settings, model=model, codec=codec, speech=speech, plan=plan,
        streamed=streamed or speech.held_out, segments=Segments(codec, speech, settings.train),
    )  # fmt: skip
