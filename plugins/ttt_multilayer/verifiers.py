"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_multilayer``, three layers and more.

One layer and two are ``ttt_linear``'s and ``ttt_mlp``'s, by the same code.
"""

from __future__ import annotations

from moshi_ttt.plugins.hybrid.verifiers import (
    HybridChunk,
    HybridNaive,
    InnerLoopChunk,
    InnerLoopNaive,
    InnerLoopRecurrent,
)

NAIVE = InnerLoopNaive(at_least=3)
CHUNK = InnerLoopChunk(at_least=3)
RECURRENT = InnerLoopRecurrent(at_least=3)
HYBRID = HybridChunk(at_least=3)
HYBRID_NAIVE = HybridNaive(at_least=3)
