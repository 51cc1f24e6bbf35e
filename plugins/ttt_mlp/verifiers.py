"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_mlp``, two fast layers."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.verifiers import Chunk, Hybrid, HybridNaive, Naive, Recurrent

NAIVE = Naive(layers=2)
CHUNK = Chunk(layers=2)
RECURRENT = Recurrent(layers=2)
HYBRID = Hybrid(layers=2)
HYBRID_NAIVE = HybridNaive(layers=2)
