"""The forms of ``ttt_multilayer`` that reference vectors are checked against: fast networks of three layers and more.

One layer and two are ``ttt_linear``'s and ``ttt_mlp``'s, by the same code.
"""

from __future__ import annotations

from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed

REFERENCE = Reference(at_least=3)
CHUNKED = Chunked(at_least=3)
STREAMED = Streamed(at_least=3)
HYBRID = Hybrid(at_least=3)
HYBRID_REFERENCE = HybridReference(at_least=3)
