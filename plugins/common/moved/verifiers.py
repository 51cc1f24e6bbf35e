"""Moved to ``moshi_ttt.plugins.hybrid.verifiers``."""

from moshi_ttt.core.deprecation import moved_names

__getattr__ = moved_names(
    "moshi_ttt.plugins.common.verifiers",
    "moshi_ttt.plugins.hybrid.verifiers",
    {
        "Reference": "InnerLoopNaive",
        "Chunked": "InnerLoopChunk",
        "Streamed": "InnerLoopRecurrent",
        "Hybrid": "HybridChunk",
        "HybridReference": "HybridNaive",
    },
)
