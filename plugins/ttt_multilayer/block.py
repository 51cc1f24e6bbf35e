"""TTT-MLP of any depth: the hybrid block with a fast network of L layers."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.ttt_multilayer.config import TTTMultilayerConfig

DEFAULT_EXPANSION = 4


class TTTMultilayer(HybridBlock):
    """f(x) = W_L gelu(... gelu(W_1 x + b_1) ...) + b_L per head and stream."""

    @staticmethod
    def widths(config: HybridConfig, head_dim: int) -> tuple[int, ...]:
        assert isinstance(config, TTTMultilayerConfig)
        hidden = config.hidden_dims
        if hidden is None:
            hidden = ((config.expansion or DEFAULT_EXPANSION) * head_dim,) * (config.depth - 1)
        return head_dim, *hidden, head_dim
