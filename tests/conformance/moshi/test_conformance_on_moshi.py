"""Every variant inside Moshi: the kit's host checks, on a random small Moshi and on the trained one that ships."""

from __future__ import annotations

import copy
import functools

import torch

from moshi_ttt.core.testing import host_conformance_tests
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.testing import moshi_case
from moshi_ttt.hosts.moshi.upstream import LMModel


@functools.cache
def loaded(dtype: torch.dtype) -> LMModel:
    return resolve_repo("builtin:tiny").load_lm(dtype=dtype)


RANDOM = moshi_case("random")
BUNDLE = moshi_case("bundle", lambda dtype: copy.deepcopy(loaded(dtype)))
OFF = {"gate": {"init": 0.0}}

test_ttt_linear = host_conformance_tests(RANDOM, "ttt_linear", {"chunk": 4}, identity=OFF)
test_ttt_mlp = host_conformance_tests(RANDOM, "ttt_mlp", {"chunk": 5}, identity=OFF)
test_gating_mlp = host_conformance_tests(RANDOM, "gating_mlp", {"chunk": 4, "lr": 0.1}, identity={})
CORRECTING = {
    "chunk": 4, "update": "ridge", "lr": 1.0, "learned_lr": True, "keys": "unit", "target_norm": True,
    "start": "next_frame", "read_scale": 8.0, "success_gate": True,
}  # fmt: skip
test_gating_mlp_that_corrects = host_conformance_tests(RANDOM, "gating_mlp", CORRECTING, identity=CORRECTING)
test_gating_mlp_on_the_bundle = host_conformance_tests(
    BUNDLE, "gating_mlp", {"chunk": 6, "lr": 0.03, "target": "hidden_states", "clip": 1.0, "decay": 0.1}, identity={}
)
test_ttt_linear_on_the_bundle = host_conformance_tests(BUNDLE, "ttt_linear", {"chunk": 8}, identity=OFF)
test_ttt_multilayer = host_conformance_tests(RANDOM, "ttt_multilayer", {"chunk": 5, "expansion": 1}, identity=OFF)
test_ttt_ridge = host_conformance_tests(RANDOM, "ttt_ridge", {"chunk": 4, "heads": 2}, identity=OFF)
test_ttt_ridge_on_the_bundle = host_conformance_tests(
    BUNDLE, "ttt_ridge", {"chunk": 6, "features": "relu2", "novelty": True, "decay": 0.1}, identity=OFF
)
test_ttt_mlp_on_the_bundle = host_conformance_tests(BUNDLE, "ttt_mlp", {"chunk": 8}, identity=OFF)
test_ttt_mlp_with_other_keys_values_and_updates = host_conformance_tests(
    RANDOM,
    "ttt_mlp",
    {"chunk": 4, "conv_kernel": 4, "value": "embedding", "inner_norm": False, "inner_steps": 2, "momentum": 0.9},
    identity=OFF,
)
test_two_blocks_in_a_layer = host_conformance_tests(
    RANDOM, "ttt_linear", {"chunk": 4}, identity=OFF, beside={"variant": "gating_mlp", "chunk": 4, "lr": 0.1}
)
