"""Moved to ``moshi_ttt.plugins.hybrid.derivatives``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.derivatives", "moshi_ttt.plugins.hybrid.derivatives")
