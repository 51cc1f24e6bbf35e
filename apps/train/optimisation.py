"""The optimizer and its schedule: AdamW under one cycle, one learning rate a group."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from moshi_ttt.apps.train.config import OptimConfig
from moshi_ttt.apps.train.model import Group, TrainedModel

BETAS = (0.9, 0.95)


def rates(config: OptimConfig) -> dict[Group, float]:
    """The highest learning rate of each group."""
    own: dict[Group, float | None] = {
        "ttt": config.lr_groups.ttt, "gates": config.lr_groups.gates,
        "lora": config.lr_groups.lora, "base": config.lr_groups.base,
    }  # fmt: skip
    return {group: config.lr if rate is None else rate for group, rate in own.items()}


def make_optimizer(trained: TrainedModel, config: OptimConfig) -> AdamW:
    """AdamW over the trained parameters. Of the blocks only matrices are decayed, of LoRA and the base everything."""
    rate, groups = rates(config), []
    for name, members in trained.groups().items():
        decayed, plain = _split(name, members)
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate[name], "weight_decay": decay, "name": name})
    return AdamW(groups, lr=config.lr, betas=BETAS, eps=config.eps)


def _split(group: Group, members: dict[str, nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    if group in ("lora", "base"):
        return list(members.values()), []
    matrices = [p for p in members.values() if p.dim() > 1 and group == "ttt"]
    known = {id(p) for p in matrices}
    return matrices, [p for p in members.values() if id(p) not in known]


def make_schedule(optimizer: AdamW, config: OptimConfig, max_steps: int) -> OneCycleLR:
    """Up from a 25th of the rate over ``pct_start`` of the steps, then down along a cosine (Smith and Topin 2017).

    The first beta moves the other way, between 0.85 and 0.95.
    """
    highest = [group["lr"] for group in optimizer.param_groups]
    rising, total = config.pct_start, max(2, max_steps)
    if rising * total == 1:
        rising += 1e-6  # a rise of one step exactly is a division by zero in torch
    return OneCycleLR(optimizer, max_lr=highest, total_steps=total, pct_start=rising)


def advance(schedule: OneCycleLR, steps: int) -> None:
    """Put a new schedule where it is after ``steps`` steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wants an optimizer step before each
        for _ in range(steps):
            schedule.step()


def current_rates(optimizer: AdamW) -> dict[str, float]:
    """Group -> its learning rate now."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def prepare_state(optimizer: AdamW) -> None:
    """Give AdamW its moments before the first step, so that they can be loaded and saved at any time."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
