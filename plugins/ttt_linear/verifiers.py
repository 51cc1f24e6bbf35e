"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_linear``, one fast layer."""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.verifiers import Chunk, Hybrid, HybridNaive, Naive, Recurrent

NAIVE = Naive(layers=1)
CHUNK = Chunk(layers=1)
RECURRENT = Recurrent(layers=1)
HYBRID = Hybrid(layers=1)
HYBRID_NAIVE = HybridNaive(layers=1)
