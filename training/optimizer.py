"""The optimizer and its schedule: AdamW with a learning rate for each group."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from moshi_ttt.configs.fit import OptimConfig
from moshi_ttt.training.trained import Group, TrainedModel

BETAS = (0.9, 0.95)
Schedule = LRScheduler

LOWEST: dict[Group, float] = {"ttt": 3e-4, "gates": 3e-3}
"""Blocks start at random values, the base model does not: a rate that fine-tunes the base leaves a block as it is. A
group without a rate of its own has ``optim.lr``, and never less than this."""
INITIAL_SCALE: dict[Group, float] = {"ttt": 0.02, "gates": 0.05}
"""How large the built-in blocks' parameters are when training starts."""


def rates(config: OptimConfig) -> dict[Group, float]:
    """The highest learning rate of each group."""
    own: dict[Group, float | None] = {
        "ttt": config.lr_groups.ttt, "gates": config.lr_groups.gates,
        "lora": config.lr_groups.lora, "base": config.lr_groups.base,
    }  # fmt: skip
    return {
        group: max(config.lr, LOWEST.get(group, 0.0)) if rate is None else rate for group, rate in own.items()
    }  # fmt: skip


def reach(rate: float, max_steps: int) -> float:
    """About the most that AdamW moves a parameter in a run: its step is at most about the rate (Kingma and Ba 2015,
    section 2.1), and the rates of one cycle, a rise and a cosine, have a mean of half the highest.
    """
    return rate * max_steps / 2


def too_low(config: OptimConfig, group: Group, max_steps: int) -> str | None:
    """Advice on a rate that is too low to train a group of new blocks, or None. A rate of 0 is allowed."""
    rate, scale = rates(config)[group], INITIAL_SCALE.get(group)
    if scale is None or rate == 0 or reach(rate, max_steps) >= scale / 2:
        return None
    return (
        f"the learning rate of {group}, {rate:g}, moves a parameter by {reach(rate, max_steps):.1g} at most in "
        f"{max_steps} steps, and new blocks start at a scale of {scale:g}: they stay almost as they were drawn. Set "
        f"optim.lr_groups.{group} to {scale / max_steps:.1g} or more, or train longer."
    )


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


def make_schedule(optimizer: AdamW, config: OptimConfig, max_steps: int) -> Schedule:
    """The schedule that ``config.schedule`` names."""
    if config.schedule == "cosine":
        rising = round(config.pct_start * max_steps)
        return LambdaLR(optimizer, lambda step: cosine_factor(step, rising, max_steps))
    return _one_cycle(optimizer, config, max_steps)


def cosine_factor(step: int, rising: int, max_steps: int) -> float:
    """Of the highest rate, in the step after ``step`` others: a linear rise over ``rising`` steps, times a half cosine
    from 1 to a tenth."""
    return min(1.0, (step + 1) / (rising + 1)) * (0.55 + 0.45 * math.cos(math.pi * step / max_steps))


def _one_cycle(optimizer: AdamW, config: OptimConfig, max_steps: int) -> OneCycleLR:
    """Up from a 25th of the rate over ``pct_start`` of the steps, then down along a cosine (Smith and Topin 2017).

    The first beta moves the other way, between 0.85 and 0.95.
    """
    highest = [group["lr"] for group in optimizer.param_groups]
    rising, total = config.pct_start, max(2, max_steps)
    if rising * total == 1:
        rising += 1e-6  # a rise of one step exactly is a division by zero in torch
    return OneCycleLR(optimizer, max_lr=highest, total_steps=total, pct_start=rising)


def advance(schedule: Schedule, steps: int) -> None:
    """Put a new schedule where it is after ``steps`` steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wants an optimizer step before each
        for _ in range(steps):
            schedule.step()


def current_rates(optimizer: AdamW) -> dict[str, float]:
    """Group -> its learning rate in the step to come."""
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
