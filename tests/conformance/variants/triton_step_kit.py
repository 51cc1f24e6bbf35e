"""The conformance kit and ``moshi-ttt verify`` with ``backend: {step: triton}``, for a process with TRITON_INTERPRET=1.

``test_hybrid_triton_step.py`` runs this module; pytest does not collect it.
"""

from __future__ import annotations

import os

import pytest
import torch

from moshi_ttt.apps.verify import verify_file
from moshi_ttt.core.testing import CHECKS, Shape, check_long_stream
from moshi_ttt.core.testing.case import default_cases
from tests.conformance.variants.grid import WITHOUT_STEPS
from tests.project import ROOT

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads it when it is imported"

SHAPES = (Shape(dim=16, heads=2, batch=2),)
OPTIONS = {
    "ttt_mlp": {"chunk": 2, "expansion": 1, "backend": {"step": "triton"}},
    "ttt_linear": {"chunk": 3, "gate": {"alpha": "layer"}, "backend": {"step": "triton"}},
    "ttt_multilayer": {"chunk": 2, "hidden_dims": [6, 10], "backend": {"step": "triton"}},
}
CASES = [
    case
    for variant, options in OPTIONS.items()
    for case in default_cases(variant, [options], shapes=SHAPES)
    if case.dtype != torch.float64  # which the kernels refuse
]
THIN = {"no_host_read", "reset", "volume_streamed", "step_in_place"}
"""Checks of the default suite, of the first case. The worker's cases have the others' substance."""
STEPS = [check for check in CHECKS if check not in WITHOUT_STEPS and check is not check_long_stream]
"""Checks that a step has a part in, but for 3,000 steps, which are an hour in the interpreter."""

VECTORS = [("linear_causal", "ttt_linear"), ("mlp_causal", "ttt_mlp"), ("multilayer3_causal", "ttt_multilayer")]


def name_of(check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", STEPS, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kit(case, check):
    check(case)


@pytest.mark.parametrize("check", [check for check in STEPS if name_of(check) in THIN], ids=name_of)
def test_kit_thin(check):
    check(CASES[0])


@pytest.mark.parametrize(("vectors", "variant"), VECTORS)
def test_verify(vectors, variant):
    report = verify_file(ROOT / "tests" / "goldens" / f"{vectors}.safetensors")
    assert report.problems == ()
    assert report.passed
    found = [each for each in report.comparisons if each.verifier == f"{variant}-triton_step"]
    assert {each.dtype for each in found} == {torch.float32}
    assert {each.name for each in found} >= {"out.y", "out.weight.0", "out.bias.0"}
