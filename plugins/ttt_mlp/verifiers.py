"""The forms of ``ttt_mlp`` that reference vectors are checked against: a fast network of 2 layer(s)."""

from __future__ import annotations

from moshi_ttt.plugins.common.verifiers import Chunked, Hybrid, HybridReference, Reference, Streamed

REFERENCE = Reference(layers=2)
CHUNKED = Chunked(layers=2)
STREAMED = Streamed(layers=2)
HYBRID = Hybrid(layers=2)
HYBRID_REFERENCE = HybridReference(layers=2)
