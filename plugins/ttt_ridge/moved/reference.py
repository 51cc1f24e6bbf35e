"""Moved to ``moshi_ttt.plugins.ttt_ridge.naive``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.ttt_ridge.reference",
    "moshi_ttt.plugins.ttt_ridge.naive",
    {"memory": "naive_ridge", "layer": "naive_layer"},
)
