"""The forms of ``ttt_linear`` that reference vectors are checked against: a fast network of 1 layer(s)."""

from __future__ import annotations

from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed

REFERENCE = Reference(layers=1)
CHUNKED = Chunked(layers=1)
STREAMED = Streamed(layers=1)
HYBRID = Hybrid(layers=1)
HYBRID_REFERENCE = HybridReference(layers=1)
