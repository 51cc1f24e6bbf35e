"""Moved to ``moshi_ttt.plugins.hybrid.naive``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.reference",
    "moshi_ttt.plugins.hybrid.naive",
    {
        "inner_loop": "naive_inner_loop",
        "hybrid_inputs": "naive_inputs",
        "hybrid_output": "naive_output",
    },
)
