"""Moved to ``moshi_ttt.evaluation.clips``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.evaluation.pieces", "moshi_ttt.evaluation.clips", {"Piece": "Clip", "heard_own": "processed_own"}
)
