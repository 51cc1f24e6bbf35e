"""Moved to ``moshi_ttt.plugins.hybrid.inner_loop``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.inner_loop",
    "moshi_ttt.plugins.hybrid.inner_loop",
    {
        "run": "moshi_ttt.plugins.hybrid.chunk:chunk_inner_loop",
        "step": "moshi_ttt.plugins.hybrid.recurrent:recurrent_inner_loop",
    },
)
