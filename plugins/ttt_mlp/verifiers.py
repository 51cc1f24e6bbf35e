"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_mlp``, two fast layers."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)

NAIVE = InnerLoopNaive(layers=2)
CHUNK = InnerLoopChunk(layers=2)
RECURRENT = InnerLoopRecurrent(layers=2)
HYBRID = HybridChunk(layers=2)
HYBRID_NAIVE = HybridNaive(layers=2)
