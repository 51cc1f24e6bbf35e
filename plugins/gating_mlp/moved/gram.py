"""Moved to ``moshi_ttt.plugins.gating_mlp.parallel``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.gating_mlp.gram", "moshi_ttt.plugins.gating_mlp.parallel", {"gram": "parallel_in_place"}
)
