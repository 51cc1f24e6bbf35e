"""Moved to ``moshi_ttt.plugins.gating_mlp.recurrent``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.gating_mlp.streaming", "moshi_ttt.plugins.gating_mlp.recurrent")
