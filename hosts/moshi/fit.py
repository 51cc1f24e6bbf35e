"""Moved to ``moshi_ttt.hosts.moshi.compatibility``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.hosts.moshi.fit", "moshi_ttt.hosts.moshi.compatibility", {"require_fit": "require_compatible"}
)
