"""Options of ``delta_rule``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.core.config import BlockConfig


class DeltaRuleConfig(BlockConfig):
    """Options of the memory.

    Attributes:
        lr: learning rate of the memory; 1 replaces what a key recalls, less mixes it.
        gate: how much of what is recalled reaches the residual at the start.
    """

    variant: Literal["delta_rule"] = "delta_rule"
    lr: float = Field(default=0.5, gt=0.0, le=1.0)
    gate: float = Field(default=0.05, ge=0.0, le=1.0)
