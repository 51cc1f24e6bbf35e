"""Load and check everything that a quickstart needs before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moshi_ttt.apps.quickstart.data import Codec, Recording, Speech, load_speech
from moshi_ttt.apps.quickstart.train import SpeechSegments
from moshi_ttt.configs.paths import find_config
from moshi_ttt.configs.reading import RUN_KEY, read_config
from moshi_ttt.configs.sections import StreamConfig, TrainConfig, renamed
from moshi_ttt.configs.settings import MODEL_KEYS, parse_settings
from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.config import TTTConfig, parse_model
from moshi_ttt.core.config_parsing import read_mapping
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.injection import Plan, make_plan
from moshi_ttt.core.registry import default_registry
from moshi_ttt.hosts.moshi.compatibility import require_unconditioned
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig
from moshi_ttt.hosts.moshi.loading import MoshiBundle
from moshi_ttt.hosts.moshi.tiny import SPEECH, speech_files


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of the command line. None stands for the config's value."""

    out: Path
    config: str = "quickstart"
    steps: int | None = None
    audio: Path | None = None
    seed: int | None = None
    overwrite: bool = False
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The config with the options of the command line."""

    ttt: TTTConfig
    host: MoshiHostConfig
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is loaded and checked before training starts."""

    settings: QuickstartSettings
    model: Any
    codec: Codec
    speech: Speech
    streamed: Recording
    plan: Plan
    segments: SpeechSegments


def read_settings(request: Request) -> QuickstartSettings:
    """Read the config and apply the options of the command line. Raises ConfigError."""
    path = find_config(request.config)
    values = read_mapping(path)
    if RUN_KEY in values:
        found = parse_settings(values, registry=default_registry(), where=path.name)
        _check_run(found.run, request.config)
        config, run = found.ttt, found.run
    else:
        config = read_config(request.config)
        changes = renamed(cast(TrainConfig, config.extra["train"]))
        run = run_config(**changes).model_copy(update={"stream": cast(StreamConfig, config.extra["stream"])})
    if not isinstance(config.host, MoshiHostConfig):
        raise ConfigError(f"The quickstart is written for the host 'moshi', the config names {config.host.name!r}.")
    if not config.ttt:
        raise ConfigError("The config has no blocks (ttt: []), so there is nothing to train. Add an entry to ttt.")
    steps = {} if request.steps is None else {"max_steps": request.steps}
    if request.seed is None:
        return QuickstartSettings(ttt=config, host=config.host, run=run.model_copy(update=steps))
    seed = {"seed": request.seed}
    stream = {"stream": run.stream.model_copy(update=seed)}
    return QuickstartSettings(
        ttt=config.model_copy(update=seed), host=config.host, run=run.model_copy(update=steps | seed | stream)
    )


def run_config(**changes: Any) -> RunConfig:
    """The training options of the packaged ``quickstart`` with some changed; of ``optim`` the given keys alone."""
    values = {key: value for key, value in read_mapping(find_config("quickstart")).items() if key not in MODEL_KEYS}
    optim = {**values["optim"], **changes.pop("optim", {})}
    optim["lr_groups"] = {**read_mapping(find_config("quickstart"))["optim"]["lr_groups"], **optim["lr_groups"]}
    return parse_model(RunConfig, {**values, **changes, "optim": optim}, "quickstart")


def _check_run(run: RunConfig, name: str) -> None:
    """Raise ConfigError where a config asks for what `moshi-ttt train` does and the quickstart does not."""
    if run.data.train_data not in SPEECH:
        raise ConfigError(
            f"{name} is the config of a training on other recordings: use `moshi-ttt train {name}`. The quickstart "
            "trains on those that ship with the package (data.train_data: builtin:speech)."
        )
    unsupported = {
        "lora.enable": run.lora.enable, "full_finetuning": run.full_finetuning, "carry_state": run.carry_state,
        "adapter": run.adapter is not None, "num_microbatches": run.num_microbatches != 1,
    }  # fmt: skip
    if asked := [option for option, is_set in unsupported.items() if is_set]:
        raise ConfigError(
            f"{name} sets {', '.join(asked)}, which the quickstart does not do: leave it out, or use `moshi-ttt train`."
        )


def prepare(settings: QuickstartSettings, audio: Path | None) -> Setup:
    """Load and check everything; the model has no blocks yet."""
    registry = default_registry()
    host = registry.host(settings.host.qualified_name)
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
        streamed=streamed or speech.held_out, segments=SpeechSegments(codec, speech, settings.run),
    )  # fmt: skip
