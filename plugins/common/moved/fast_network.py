"""Moved to ``moshi_ttt.plugins.hybrid.fast_network``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.fast_network",
    "moshi_ttt.plugins.hybrid.fast_network",
    {
        "teach": "chunk_gradients",
    },
)
