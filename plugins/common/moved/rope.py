"""Moved to ``moshi_ttt.plugins.hybrid.rope``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.rope", "moshi_ttt.plugins.hybrid.rope")
