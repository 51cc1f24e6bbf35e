"""Moved to ``moshi_ttt.plugins.hybrid.weight_maps``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names("moshi_ttt.plugins.common.weight_maps", "moshi_ttt.plugins.hybrid.weight_maps")
