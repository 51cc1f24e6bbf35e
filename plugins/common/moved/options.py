"""Moved to ``moshi_ttt.plugins.hybrid.config``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.options",
    "moshi_ttt.plugins.hybrid.config",
    {
        "GateConfig": "moshi_ttt.plugins.common.gate:GateConfig",
    },
)
