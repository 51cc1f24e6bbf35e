"""The conformance kit on the built-in variants, at several chunk sizes."""

from __future__ import annotations

import pytest

from moshi_ttt.core.testing import check_long_stream, conformance_tests, default_cases

test_ttt_linear = conformance_tests(
    "ttt_linear", {"chunk": 4}, {"chunk": 5}, {"chunk": 2, "checkpoint_chunks": 2}, {"chunk": 4, "causal": False}
)
test_ttt_mlp = conformance_tests(
    "ttt_mlp",
    {"chunk": 4},
    {"chunk": 7, "expansion": 2, "gate": {"alpha": "layer", "init": 0.3}},
    {"chunk": 4, "causal": False, "gate": {"alpha": "fixed", "init": 0.2}},
    {"chunk": 5, "bidirectional": True, "checkpoint_chunks": 1},
)
test_ttt_multilayer = conformance_tests("ttt_multilayer", {"chunk": 4, "expansion": 2})
test_depths_of_ttt_multilayer = pytest.mark.exhaustive(  # of one, two and three layers, the tests above
    conformance_tests(
        "ttt_multilayer",
        {"chunk": 5, "hidden_dims": (6, 10, 4)},
        {"chunk": 4, "depth": 4, "expansion": 1, "causal": False},
    )
)
test_ttt_linear_compiled = pytest.mark.exhaustive(  # the C++ of the next, with a layer less
    conformance_tests(
        "ttt_linear", {"chunk": 4}, {"chunk": 5, "conv_kernel": 3, "value": "embedding"}, compiled_step=True
    )
)
test_ttt_mlp_compiled = conformance_tests("ttt_mlp", {"chunk": 4}, compiled_step=True)
test_ttt_multilayer_compiled = pytest.mark.exhaustive(  # the same
    conformance_tests("ttt_multilayer", {"chunk": 5, "hidden_dims": (6, 10, 4)}, compiled_step=True)
)
test_options_of_ttt_linear = pytest.mark.exhaustive(  # next and in the MLP, but init_std: test_hybrid_options.py
    conformance_tests(
        "ttt_linear",
        {"chunk": 4, "conv_kernel": 4},
        {"chunk": 3, "value": "embedding", "init_std": 0.5},
        {"chunk": 4, "inner_norm": False},
        {"chunk": 4, "momentum": 0.9},
        {"chunk": 4, "inner_steps": 2},
    )
)
test_options_of_ttt_linear_together = conformance_tests(
    "ttt_linear",
    {
        "chunk": 2,
        "conv_kernel": 3,
        "value": "embedding",
        "inner_norm": False,
        "inner_steps": 2,
        "learned_momentum": True,
        "checkpoint_chunks": 2,
    },
)
test_options_of_ttt_mlp = conformance_tests(
    "ttt_mlp",
    {"chunk": 4, "expansion": 2, "inner_norm": False, "learned_momentum": True, "momentum": 0.5},
    {"chunk": 4, "causal": False, "conv_kernel": 3, "value": "embedding", "inner_steps": 2, "momentum": 0.3},
    {"chunk": 5, "bidirectional": True, "conv_kernel": 2, "value": "embedding", "inner_norm": False},
)
test_further_options_of_ttt_mlp = (
    pytest.mark.exhaustive(  # above with other values, but init_std: test_hybrid_options.py
        conformance_tests(
            "ttt_mlp",
            {"chunk": 4, "expansion": 2, "conv_kernel": 2, "value": "embedding", "init_std": 0.3},
            {"chunk": 3, "expansion": 1, "inner_steps": 3, "checkpoint_chunks": 1},
        )
    )
)
test_options_of_ttt_multilayer = pytest.mark.exhaustive(  # of one and of two layers, the tests above
    conformance_tests(
        "ttt_multilayer",
        {"chunk": 4, "expansion": 1, "conv_kernel": 4, "learned_momentum": True},
        {
            "chunk": 3,
            "hidden_dims": (5, 3),
            "inner_norm": False,
            "inner_steps": 2,
            "momentum": 0.8,
            "value": "embedding",
        },
    )
)
test_gating_mlp = conformance_tests(
    "gating_mlp",
    {"chunk": 4, "lr": 0.1},
    {"chunk": 5, "lr": 0.1, "conv_kernel": 4, "target": "hidden_states", "learned_lr": True, "decay": 0.1, "clip": 0.5},
    {"chunk": 3, "lr": 0.1, "conv_kernel": 2, "padding": "causal", "decay": 0.2},
    {"chunk": "0.48s", "lr": 0.1, "conv_kernel": 2, "train_w_down": True},
)
BEST = {"keys": "unit", "target_norm": True, "start": "next_frame", "success_gate": True}
test_gating_mlp_corrections = conformance_tests(
    "gating_mlp",
    {"chunk": 4, "update": "ridge", "lr": 1.0, "learned_lr": True, "read_scale": 8.0, **BEST},
    {"chunk": 5, "update": "ridge", "conv_kernel": 4, "target": "hidden_states", "decay": 0.1, "clip": 0.5},
    {"chunk": 3, "update": "gradient", "learned_lr": True, "conv_kernel": 6, "read_scale": 2.0, **BEST},
    {"chunk": 5, "update": "gradient", "lr": 0.05, "conv_kernel": 2, "padding": "causal", "decay": 0.2, "clip": 1.0},
    {"chunk": 4, "update": "hebbian", "lr": 0.1, "conv_kernel": 2, "train_w_down": True, **BEST},
)
test_gating_mlp_compiled = conformance_tests(
    "gating_mlp",
    {"chunk": 4, "lr": 0.1},
    {"chunk": 5, "lr": 0.1, "conv_kernel": 4, "target": "hidden_states", "learned_lr": True, "decay": 0.1, "clip": 0.5},
    {"chunk": 4, "update": "ridge", "lr": 1.0, "learned_lr": True, "read_scale": 8.0, **BEST},
    {"chunk": 5, "update": "ridge", "conv_kernel": 4, "target": "hidden_states", "decay": 0.1, "clip": 0.5},
    {"chunk": 3, "update": "gradient", "learned_lr": True, "conv_kernel": 6, "read_scale": 2.0, **BEST},
    compiled_step=True,
)
test_ttt_ridge = conformance_tests(
    "ttt_ridge",
    {"chunk": 4},
    {"chunk": 5, "heads": 2, "features": "relu2", "key_width": 20, "novelty": True, "checkpoint_chunks": 2},
    {"chunk": "0.4s", "heads": 2, "decay": 0.2, "variance_gate": True, "value": "hidden", "conv_kernel": 2},
    {"chunk": 4, "success_gate": False, "gate": {"alpha": "fixed", "init": 0.3}},
)
test_ttt_ridge_compiled = conformance_tests(
    "ttt_ridge",
    {"chunk": 4},
    {"chunk": 5, "heads": 2, "features": "relu2", "key_width": 20, "novelty": True},
    {"chunk": "0.4s", "heads": 2, "decay": 0.2, "variance_gate": True, "value": "hidden", "conv_kernel": 2},
    {"chunk": 4, "success_gate": False, "decay": 0.1, "novelty": True, "gate": {"alpha": "fixed", "init": 0.3}},
    compiled_step=True,
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp", "ttt_multilayer", "ttt_ridge", "gating_mlp"])
def test_thirty_thousand_steps(variant):
    for case in default_cases(variant, [{"chunk": 16}]):
        check_long_stream(case, steps=30_000)
