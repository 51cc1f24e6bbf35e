"""Moved to ``moshi_ttt.plugins.gating_mlp.naive``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.gating_mlp.reference", "moshi_ttt.plugins.gating_mlp.naive", {"in_place": "naive_in_place"}
)
