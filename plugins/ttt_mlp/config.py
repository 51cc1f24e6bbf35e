"""Options of ``ttt_mlp``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moshi_ttt.plugins.hybrid.config import HybridConfig


class TTTMLPConfig(HybridConfig):
    """TTT-MLP: the fast network is a two-layer MLP per head.

    Attributes:
        expansion: hidden width over head width.
    """

    variant: Literal["ttt_mlp"] = "ttt_mlp"
    base_lr: float = Field(default=0.1, gt=0.0)
    expansion: int = Field(default=4, ge=1)
