"""The conformance kit on the built-in variants, at several chunk sizes."""

from __future__ import annotations

from moshi_ttt.core.testing import conformance_tests

test_ttt_linear = conformance_tests(
    "ttt_linear", {"chunk": 4}, {"chunk": 5}, {"chunk": 2}, {"chunk": 4, "causal": False}
)
test_ttt_mlp = conformance_tests("ttt_mlp", {"chunk": 4}, {"chunk": 7, "expansion": 2}, {"chunk": 4, "causal": False})
