"""Moved to ``moshi_ttt.plugins.hybrid.objective``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.objective", "moshi_ttt.plugins.hybrid.objective")
