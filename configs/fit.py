"""The options of the training loop, for any host. The config of a training run adds data, model and logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.core.config import FrozenConfig, Seed


class GroupRates(FrozenConfig):
    """Learning rates of single groups.

    A group without one has ``optim.lr``; the blocks (``ttt``) at least 3e-4 and their gates at least 3e-3, because they
    start at random values.

    Attributes:
        ttt: of the blocks, without their gates.
        gates: of the blocks' gates.
        lora: of the LoRA.
        base: of the base model, with ``full_finetuning``.
    """

    ttt: float | None = Field(default=None, ge=0.0)
    gates: float | None = Field(default=None, ge=0.0)
    lora: float | None = Field(default=None, ge=0.0)
    base: float | None = Field(default=None, ge=0.0)


class OptimConfig(FrozenConfig):
    """AdamW (betas 0.9, 0.95) and the schedule of its learning rates.

    Attributes:
        lr: the highest learning rate.
        weight_decay: of LoRA and base parameters, and of the blocks' matrices; their vectors and gates are not decayed.
        schedule: ``one_cycle`` rises from a 25th of the rate and falls along a cosine to almost nothing, the first
            beta moving the other way; ``cosine`` rises linearly and falls along a cosine to a tenth.
        pct_start: share of all steps in which the rate rises.
        eps: AdamW's; 1e-6 makes runs on different numbers of ranks agree more closely.
        lr_groups: rates of single groups.
    """

    lr: float = Field(default=1e-4, ge=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    pct_start: float = Field(default=0.05, ge=0.0, le=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    lr_groups: GroupRates = GroupRates()


class FitConfig(FrozenConfig):
    """The options of ``moshi_ttt.training.Trainer.fit``.

    Attributes:
        seed: of the data's order, and of initial values that are drawn.
        batch_size: rows of a forward pass on one rank; one step sees batch_size x num_microbatches x ranks.
        num_microbatches: forward passes of one step, whose gradients are added.
        max_steps: optimizer steps.
        max_norm: the largest gradient norm; larger gradients are scaled down.
        optim: optimizer and schedule.
        inner_lr_warmup: let the blocks' inner learning rate rise with the main one, to its full value at its peak.
        carry_state: carry each row's state from one step to the next, until its document ends.
        max_bad_steps: steps in a row whose loss or gradient is not finite (they are skipped) before the run stops.
    """

    seed: Seed = 0
    batch_size: int = Field(default=1, ge=1)
    num_microbatches: int = Field(default=1, ge=1)
    max_steps: int = Field(default=100, ge=1)
    max_norm: float = Field(default=1.0, gt=0.0)
    optim: OptimConfig = OptimConfig()
    inner_lr_warmup: bool = False
    carry_state: bool = False
    max_bad_steps: int = Field(default=5, ge=1)

    @property
    def accumulates_whole(self) -> bool:
        """Whether ranks hold whole gradients until a step's last micro-batch, and exchange them once."""
        return True
