"""The option ``gate``: how much of what a layer computes is added to the residual stream."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.core.config import FrozenConfig


class GateConfig(FrozenConfig):
    """``tanh(alpha)`` times the layer's output.

    Attributes:
        init: alpha at the start; 0 makes the block an identity.
        alpha: one learned for each ``channel``, one learned for the whole ``layer``, or ``fixed`` at ``init``.
    """

    init: float = Field(default=0.05, ge=0.0, le=1.0)
    alpha: Literal["channel", "layer", "fixed"] = "channel"
