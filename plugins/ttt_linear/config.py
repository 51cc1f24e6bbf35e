"""Options of ``ttt_linear``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.plugins.hybrid.config import HybridConfig


class TTTLinearConfig(HybridConfig):
    """TTT-Linear: the fast network is one linear layer per head."""

    variant: Literal["ttt_linear"] = "ttt_linear"
    base_lr: float = Field(default=1.0, gt=0.0)
