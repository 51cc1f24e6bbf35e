"""Training and resuming hosts that are not Moshi, in a process that never imports Moshi: ``... HOST FOLDER``.

Prints one line of JSON. Started by test_any_host.py, alone or under torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ["MOSHI_TTT_PLUGINS"] = "builtin,audio,ttt_linear"

import torch
from rich.console import Console
from torch import Tensor, nn

from moshi_ttt import default_registry, make_plan
from moshi_ttt.configs.fit import FitConfig, OptimConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.sharding import shard, whole
from moshi_ttt.core.testing import TOY_HOST, ToyModel
from moshi_ttt.hosts.audio.host import AUDIO_HOST, AudioHostConfig
from moshi_ttt.hosts.audio.model import made_up_recordings
from moshi_ttt.training import Callback, Runtime, Step, TrainedModel, Trainer, start
from moshi_ttt.training.callbacks import BadData, Health, IdleParameters, Logging
from moshi_ttt.training.checkpoint import CheckpointWriter, find_checkpoints, load
from moshi_ttt.training.logs import RunLog
from moshi_ttt.training.saving import Checkpoints
from moshi_ttt.training.validation import Validation

STEPS, MICROBATCHES, LENGTH, ROWS = 5, 2, 12, 4


class Rows(NamedTuple):
    """A batch of a host whose inputs are tensors."""

    tensors: Any
    document_ids: Tensor
    problems: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        return LENGTH

    def inputs(self, device: torch.device) -> Any:
        if isinstance(self.tensors, Tensor):
            return self.tensors.to(device)
        return tuple(each.to(device) for each in self.tensors)


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.found.append(step.losses.total)


def inputs(host: str, row: int, step: int) -> Any:
    """Of row ``row`` of the global batch, ``[1, ...]``."""
    if host == "audio":
        return made_up_recordings(1, LENGTH, 32, seed=100 * step + row)
    return torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(100 * step + row))


def batches(host: str, runtime: Runtime, first: int) -> Iterator[Rows]:
    """This rank's micro-batches from step ``first`` on; a document lasts three steps."""
    size = ROWS // (MICROBATCHES * runtime.world_size)
    for step in range(first, 10 * STEPS):
        for microbatch in range(MICROBATCHES):
            begin = (microbatch * runtime.world_size + runtime.rank) * size
            found = [inputs(host, row, step) for row in range(begin, begin + size)]
            ids = torch.arange(begin, begin + size) + ROWS * (step // 3)
            tensors = torch.cat(found) if host == "toy" else tuple(map(torch.cat, zip(*found, strict=True)))
            yield Rows(tensors, ids)


def trainer(host: str, runtime: Runtime, variant: str) -> Trainer:
    adapter: HostModel = AUDIO_HOST if host == "audio" else TOY_HOST
    model: nn.Module = ToyModel(16, 2, num_layers=4, dtype=torch.float32)
    if host == "audio":
        model = AUDIO_HOST.load(AudioHostConfig())
    registry = default_registry()
    entry = parse_block(
        {"variant": variant, "layers": "last:2", "chunk": 4, "causal": host == "toy"}, registry=registry
    )
    policy = registry.policy("fp32_state")
    injection = make_plan(model, adapter, [entry], policy=policy, registry=registry).apply(model)
    injection.freeze_base()
    roles = policy.roles(torch.float32)
    shard(adapter, model, roles, runtime.mesh)
    config = FitConfig(
        batch_size=ROWS // (MICROBATCHES * runtime.world_size), num_microbatches=MICROBATCHES, max_steps=STEPS,
        carry_state=host == "toy", optim=OptimConfig(lr=1e-2, eps=1e-6),
    )  # fmt: skip
    return Trainer(TrainedModel(model, injection, roles, adapter.losses()), config, runtime)


def fit(made: Trainer, host: str, folder: Path) -> Losses:
    """Train to the end, with a checkpoint after each second step and a validation after the last."""
    bad, losses = BadData(segments=1, max_share=0.0), Losses()
    writer = CheckpointWriter(folder, made.runtime, None, made.step)
    checkpoints = Checkpoints(writer, 2, position=dict, export=lambda step: lambda target: None)
    held_out = Validation(lambda: [[next(batches(host, made.runtime, 40))]], 1, 0, bad, None)
    callbacks = [bad, IdleParameters(None), losses, checkpoints, held_out]
    with (
        RunLog(folder, Console(quiet=True), total=STEPS, start=made.step)
        if made.runtime.first
        else nullcontext() as log
    ):
        if log is not None:
            callbacks[2:2] = [Health(log, 1), Logging(log, 1)]
            held_out.log = log
        made.fit(batches(host, made.runtime, made.step), callbacks)
    writer.close()
    return losses


def main(host: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with start("cpu", None) as runtime:
        straight = trainer(host, runtime, "ttt_linear")
        losses = fit(straight, host, folder / "straight")
        resumed = trainer(host, runtime, "ttt_linear")
        load(resumed, find_checkpoints(folder / "straight")[0], {})
        rest = fit(resumed, host, folder / "resumed")
        found = {
            "losses": losses.found,
            "rest": rest.found,
            "validation": [straight.outcome.losses[STEPS].total, resumed.outcome.losses[STEPS].total],
            "checkpoints": [path.name for path in find_checkpoints(folder / "straight")],
            "equal": all(
                torch.equal(whole(first), whole(second))
                for first, second in zip(straight.parameters, resumed.parameters, strict=True)
            ),
            "logged": [json.loads(line) for line in (folder / "straight" / "metrics.jsonl").read_text().splitlines()],
            "carried": [state is not None and bool(state.blocks) for state in straight.carried],
            "moshi": sorted(name for name in sys.modules if name.startswith(("moshi.", "moshi_ttt.hosts.moshi"))),
        }
        if runtime.first:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
