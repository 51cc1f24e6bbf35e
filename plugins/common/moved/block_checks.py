"""Moved to ``moshi_ttt.plugins.hybrid.checks``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.block_checks", "moshi_ttt.plugins.hybrid.checks")
