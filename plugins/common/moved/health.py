"""Moved to ``moshi_ttt.plugins.hybrid.diagnostics``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.health", "moshi_ttt.plugins.hybrid.diagnostics")
