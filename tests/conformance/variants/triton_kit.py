"""The conformance kit and ``moshi-ttt verify`` with ``backend: triton``, for a process with TRITON_INTERPRET=1.

``test_hybrid_triton.py`` runs this module; pytest does not collect it.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from moshi_ttt.apps.verify import verify_file
from moshi_ttt.core.testing import CHECKS, Shape, check_device, error
from moshi_ttt.core.testing.case import default_cases
from moshi_ttt.plugins.hybrid.verifiers import InnerLoopNaive

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads it when it is imported"

SHAPES = (Shape(dim=32, heads=2, batch=2),)  # heads of 16, the least that the kernels take
OPTIONS = {
    "ttt_linear": {"chunk": 16, "backend": {"train": "triton"}},
    "ttt_mlp": {"chunk": 16, "expansion": 1, "backend": {"train": "triton"}},
}
CASES = [
    case
    for variant, options in OPTIONS.items()
    for case in default_cases(variant, [options], shapes=SHAPES)
    if case.dtype != torch.float64  # which the kernels refuse
]
THIN = {
    "splits",
    "exec_mask",
    "checkpointing",
    "two_forwards",
    "nonfinite_recovery",
    "updates_off",
    "detached_state",
    "other_modes",
}
"""Checks of the default suite, in float32."""


def thin(check) -> bool:
    return check.__name__.removeprefix("check_") in THIN


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kit(case, check):
    check(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kit_device_with_kernels(case):
    """``check_device`` leaves a backend out that was chosen for this machine; these kernels serve without values."""
    check_device(case, as_is=True)


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if thin(check)], ids=lambda check: check.__name__.removeprefix("check_")
)
@pytest.mark.parametrize("variant", OPTIONS)
def test_kit_thin(variant, check):
    (case,) = (case for case in CASES if case.variant == variant and case.dtype == torch.float32)
    check(case)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", OPTIONS)
def test_a_call_is_that_of_tensor_operations(variant, causal):
    """Whole chunks, and what is before and after them: outputs, state and every gradient."""
    cases = [
        case.at(config=case.config.model_copy(update={"backend": backend, "causal": causal}))
        for case in CASES
        for backend in ("torch", case.config.backend)
        if case.variant == variant and case.dtype == torch.float32
    ]
    found = []
    for case in cases:
        block, x = case.block(), case.inputs(16 * 3 + 21)
        state = None
        if causal:
            some = case.context(x[:, :21], exec_mask=torch.tensor([True, False]))
            state = block(x[:, :21], block.allocate_state(2), some)[1]
            state = {name: tensor.detach() for name, tensor in state.items()}
        x = x[:, 21:].requires_grad_()
        y, after = block(x, state, case.context(x, updates=torch.tensor([True, True])))
        (y.square().sum() + sum(t.square().sum() for t in after.values() if t.requires_grad)).backward()
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad, **after, **gradients})
    assert found[0].keys() == found[1].keys()
    assert {name: error(found[1][name], found[0][name]) for name in found[0]} == pytest.approx(
        dict.fromkeys(found[0], 0.0), abs=1e-5
    )


def reference(folder, layers):
    """A file of reference vectors of the inner loop with chunks and heads of 16, by the definition."""
    generator = torch.Generator().manual_seed(layers)

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {name: random(1, 2, 37, 16) for name in "qkv"} | {"lr": random(1, 2, 37).abs() / 16}
    inputs |= {"norm_weight": 1 + random(2, 16, scale=0.1), "norm_bias": random(2, 16, scale=0.1)}
    inputs["token_scale"] = 1 / torch.arange(1, 17, dtype=torch.float64)
    for i in range(layers):
        inputs |= {f"weight.{i}": random(2, 16, 16, scale=0.3), f"bias.{i}": random(2, 1, 16, scale=0.2)}
    metadata = {
        "op": "inner_loop", "source": "the definition", "chunk_size": "16", "layers": str(layers), "causal": "true",
        "norm_eps": "1e-6", "activation": "gelu_tanh",
    }  # fmt: skip
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    outputs = InnerLoopNaive(layers=layers).run(leaves, metadata)
    cotangent = random(*outputs["y"].shape)
    gradients = torch.autograd.grad((outputs["y"] * cotangent).sum(), list(leaves.values()))
    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()} | {"in.cotangent": cotangent}
    tensors |= {f"out.{name}": tensor for name, tensor in outputs.items()}
    tensors |= {f"grad.{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    path = folder / f"layers{layers}.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(("layers", "variant"), [(1, "ttt_linear"), (2, "ttt_mlp")])
def test_verify(tmp_path, layers, variant):
    report = verify_file(reference(tmp_path, layers))
    assert report.problems == ()
    assert report.passed
    found = [each for each in report.comparisons if each.verifier == f"{variant}-triton"]
    assert {each.dtype for each in found} == {torch.float32}
    assert len(found) > 10
