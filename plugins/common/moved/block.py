"""Moved to ``moshi_ttt.plugins.hybrid.block``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.block",
    "moshi_ttt.plugins.hybrid.block",
    {
        "Projection": "moshi_ttt.plugins.common.projection:Projection",
        "INIT_STD": "moshi_ttt.plugins.common.projection:INIT_STD",
    },
)
