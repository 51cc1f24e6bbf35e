"""The launches and the memory of a whole training step of Moshi 7B, counted without a GPU: a table for docs/gpu.md.

    python scripts/step_costs.py            # prints the table
    python scripts/step_costs.py --write    # writes it into docs/gpu.md

A step is counted on tensors without values (``moshi_ttt.core.device_log``): the losses' weights, the forward pass, the
backward pass with each layer computed again, clipping, and AdamW. What sharding adds is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from table_in_page import TableInPage, markdown, print_or_write
from torch import nn
from torch.optim import AdamW

from moshi_ttt.configs.settings import Settings, parse_settings
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.health import HealthMonitor
from moshi_ttt.core.registry import default_registry
from moshi_ttt.training.activations import step_bytes
from moshi_ttt.training.model import skeleton
from moshi_ttt.training.optimizer import make_optimizer
from moshi_ttt.training.trained import TrainedModel

TABLE = TableInPage("step costs", "step_costs.py")
MODEL, BLOCKS, ROWS, FRAMES = "builtin:moshi-7b", "last:3", 2, 1250
"""Of the table: the model, the layers with a block, rows and tokens of a row (100 seconds)."""
OF_COUNTERS = ("aten._local_scalar_dense.default", "aten._foreach_add_.Tensor")
"""What AdamW does with its counters of steps, which are on the CPU."""

RUNS: tuple[tuple[str, dict[str, Any] | None, bool], ...] = (
    ("LoRA", None, False),
    *(
        (f"LoRA and three ttt_mlp, chunk {chunk}, {backend}{', carried' if carried else ''}",
         {"variant": "ttt_mlp", "chunk": chunk, "backend": {"train": backend}}, carried)
        for carried in (False, True) for backend in ("torch", "triton") for chunk in (16, 32)
    ),
)  # fmt: skip
"""Name, block, and whether memory is carried from segment to segment."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of a step.

    Attributes:
        forward, backward: launches of each pass, computed layers again among those of the latter.
        update: launches of the losses' weights, of clipping and of the optimizer.
        health: launches that a step has besides in which the blocks' health is measured.
        peak: bytes of a step at its peak, without parameters and the optimizer's moments.
    """

    forward: int
    backward: int
    update: int
    health: int
    peak: int

    @property
    def launches(self) -> int:
        """All but those of health."""
        return self.forward + self.backward + self.update


def settings_of(block: Mapping[str, Any] | None, *, model: str = MODEL, layers: str = BLOCKS) -> Settings:
    """A run with LoRA and, where it is given, a block in some layers; everything else is the default."""
    values: dict[str, Any] = {
        "data": {"train_data": "none.jsonl"}, "run_dir": "run", "moshi_paths": {"hf_repo_id": model},
        "lora": {"enable": True}, "ttt": [] if block is None else [{"layers": layers, **block}],
    }  # fmt: skip
    return parse_settings(values, registry=default_registry(), where="a run that is counted")


def step_cost(settings: Settings, *, rows: int, frames: int, carried: bool) -> StepCost:
    """The cost of a step of one micro-batch of so many rows and frames."""
    trained = skeleton(settings, default_registry())

    def counted(health: bool) -> Any:
        monitor: Any = HealthMonitor(trained.injection.blocks, sample=True) if health else nullcontext()
        with monitor:
            return step_bytes(trained, rows=rows, frames=frames, carried=carried, gradients=True)

    step, measured = counted(False), counted(bool(trained.injection.blocks))
    update = _weights(trained, rows, frames) + _update(trained, settings)
    return StepCost(
        forward=step.forward, backward=step.backward, update=update, health=measured.forward - step.forward,
        peak=step.peak,
    )  # fmt: skip


def _weights(trained: TrainedModel, rows: int, frames: int) -> int:
    codes = torch.empty(rows, trained.model.num_codebooks, frames, dtype=torch.int64, device="meta")
    with DeviceLog() as log:
        trained.losses.weights(trained.model, codes)
    return log.num_launches


def _update(trained: TrainedModel, settings: Settings) -> int:
    """Launches of clipping and of AdamW, on stand-ins of one number: lists of tensors need CUDA or the CPU."""
    stand_ins = {parameter: nn.Parameter(torch.zeros(1)) for parameter in trained.trained().values()}
    groups = [
        {**group, "params": [stand_ins[parameter] for parameter in group["params"]]}
        for group in make_optimizer(trained, settings.run.optim).param_groups
    ]
    optimizer = AdamW([{**group, "foreach": True} for group in groups])
    for parameter in stand_ins.values():
        parameter.grad = torch.zeros(1)
    optimizer.step()  # makes its moments
    with DeviceLog("cpu") as log:
        nn.utils.clip_grad_norm_(list(stand_ins.values()), settings.run.max_norm, foreach=True)
        optimizer.step()
    return sum(count for name, count in log.launches.items() if name not in OF_COUNTERS)


HEADINGS = (
    "step", "forward", "backward", "update", "launches", "times LoRA alone", "health, where measured", "peak, GiB",
)  # fmt: skip


def table() -> str:
    found = {name: step_cost(settings_of(block), rows=ROWS, frames=FRAMES, carried=carried)
             for name, block, carried in RUNS}  # fmt: skip
    alone = found["LoRA"].launches
    rows = []
    for name, cost in found.items():
        counts = (cost.forward, cost.backward, cost.update, cost.launches)
        times, health = f"{cost.launches / alone:.3f}", f"{cost.health:,}"
        cells = (*(f"{count:,}" for count in counts), times, health, f"{cost.peak / 2**30:.2f}")
        rows.append((name, *cells))
    return markdown(HEADINGS, rows)


if __name__ == "__main__":
    print_or_write(TABLE, table, __doc__)
