"""TTT-MLP: the hybrid block with a fast network of two layers."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.ttt_mlp.config import TTTMLPConfig


class TTTMLP(HybridBlock):
    """f(x) = gelu(x W1 + b1) W2 + b2, with W1 ``[Dh, expansion * Dh]`` and W2 its mirror, per head and stream."""

    @staticmethod
    def widths(config: HybridConfig, head_dim: int) -> tuple[int, ...]:
        assert isinstance(config, TTTMLPConfig)
        return head_dim, config.expansion * head_dim, head_dim
