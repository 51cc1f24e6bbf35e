"""TTT-Linear: the hybrid block with a fast network of one layer."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.config import HybridConfig


class TTTLinear(HybridBlock):
    """f(x) = x W + b, with W ``[Dh, Dh]`` per head and stream."""

    @staticmethod
    def widths(config: HybridConfig, head_dim: int) -> tuple[int, ...]:
        return head_dim, head_dim
