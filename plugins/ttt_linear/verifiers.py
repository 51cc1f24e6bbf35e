"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_linear``, one fast layer."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)

NAIVE = InnerLoopNaive(layers=1)
CHUNK = InnerLoopChunk(layers=1)
RECURRENT = InnerLoopRecurrent(layers=1)
HYBRID = HybridChunk(layers=1)
HYBRID_NAIVE = HybridNaive(layers=1)
