"""Derivatives of gradients: against the definition differentiated by plain autograd; what they must not change."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moshi_ttt.core.testing import Shape, default_cases, error
from moshi_ttt.plugins.gating_mlp.chunkwise import chunkwise_in_place
from moshi_ttt.plugins.gating_mlp.parallel import parallel_in_place
from moshi_ttt.plugins.hybrid.derivatives import differentiable_again
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from tests.unit.plugins.test_inner_loop import DEPTHS, Problem

CASES = [
    ("ttt_linear", {"chunk": 4}),
    ("ttt_linear", {"chunk": 4, "causal": False}),
    ("ttt_mlp", {"chunk": 4, "bidirectional": True}),
    ("ttt_multilayer", {"chunk": 4, "expansion": 2}),
    ("ttt_ridge", {"chunk": 4, "heads": 2, "decay": 0.1, "novelty": True}),
    ("gating_mlp", {"chunk": 4, "decay": 0.1, "clip": 0.5, "learned_lr": True}),
]


def case_of(variant, options, dtype=torch.float64):
    (found,) = (case for case in default_cases(variant, [options]) if case.dtype == dtype)
    return found.at(shape=Shape(dim=8, heads=2, batch=2))


def along(gradients, seed=3):
    """A number that depends on every gradient."""
    generator = torch.Generator().manual_seed(seed)
    parts = [(g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in gradients]
    return torch.stack(parts).sum()


def second(y, leaves):
    first = torch.autograd.grad(y.square().sum() + along([y]), leaves, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(along(first), leaves, materialize_grads=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("widths", DEPTHS, ids=str)
def test_the_inner_loop_twice_is_the_definition_twice(widths, causal):
    problem = Problem(widths, length=9)
    norm = InnerNorm(problem.norm_weight, problem.norm_bias, 1e-6, exact=True)
    with mock.patch.object(Problem, "norm", norm):
        y, _ = problem.run(causal)
    expected = second(problem.reference(causal)[0], problem.leaves)
    for actual, wanted in zip(second(y, problem.leaves), expected, strict=True):
        assert error(actual, wanted) < 1e-9


def test_the_loss_gradient_written_out_is_torchs():
    problem = Problem((4, 4))
    z, target = (x.detach() for x in (problem.k, problem.v))
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        parts = [part.detach().to(dtype) for part in (problem.norm_weight, problem.norm_bias)]
        fast, exact = (InnerNorm(*parts, 1e-6, exact).loss_gradient(z.to(dtype), target.to(dtype)) for exact in (0, 1))
        assert exact.dtype == dtype
        assert error(exact, fast) < bound


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("length", [6, 12, 14])
def test_both_forms_of_in_place_learning_agree_twice(length, with_start, decay):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    keys, values, start = random(2, length, 6), random(2, length, 5), random(2, 6, 5) if with_start else None
    leaves = [keys, values, *([start] if with_start else [])]
    chunks = -(-length // 4)
    complete = torch.arange(4, 4 * chunks + 1, 4)[None] <= length
    taught = torch.tensor([[True] * chunks, [i % 2 == 0 for i in range(chunks)]])
    both = [
        second(form(keys, values, start, complete, taught, decay, 4), leaves)
        for form in (parallel_in_place, chunkwise_in_place)
    ]
    for actual, wanted in zip(*both, strict=True):
        assert error(actual, wanted) < 1e-12
    assert any(float(wanted.abs().max()) > 0 for wanted in both[1])


@pytest.mark.exhaustive  # the kit's check_second_derivatives compares with finite differences by default
@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
def test_gradgradcheck(variant, options):
    case = case_of(variant, options)
    block, x = case.block(), case.inputs(9).requires_grad_()
    names = [name for name, _ in block.named_parameters()]

    def function(x, *parameters):
        arguments = (x, None, case.context(x))
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), arguments)[0]

    parameters = [parameter.detach().clone().requires_grad_() for parameter in block.parameters()]
    assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("variant", "options"), CASES[:-1], ids=str)
def test_a_first_gradient_is_as_without_them_bit_for_bit_and_keeps_no_more(variant, options):
    case = case_of(variant, options, torch.float32).at(shape=Shape(dim=16, heads=2, batch=2))
    block, x = case.block(), case.inputs(9).requires_grad_()
    results = []
    for form in (differentiable_again, lambda outputs, *_: tuple(outputs)):
        kept, alive = {}, []

        def keep(tensor, kept=kept, alive=alive):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or a later one would get its address
            return tensor

        with mock.patch("moshi_ttt.plugins.hybrid.block.differentiable_again", form):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = case.call(block, x, want_state=False)[0]
            gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        owned = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters())}
        results.append(gradients)
        results.append(sum(size for address, size in kept.items() if address not in owned))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    assert results[1] == results[3]


@pytest.mark.parametrize("variant", ["ttt_linear", "ttt_mlp"])
def test_a_token_of_zeros_has_them_too(variant):
    """Before training the projections have no bias, so its query, key and value are zero, where a norm has a corner."""
    case = case_of(variant, {"chunk": 4})
    block, x = case.block(), case.inputs(9)
    block.reset_parameters(torch.Generator().manual_seed(0))
    x[0, 3] = 0
    leaves = [x.requires_grad_(), *block.parameters()]
    assert all(gradient.isfinite().all() for gradient in second(case.call(block, x)[0], leaves))
    other = case.inputs(9)
    other[1] = x[1].detach()
    rows = [second(case.call(block, each)[0], [each])[0][1] for each in (x, other.requires_grad_())]
    assert error(*rows) < 1e-12, "a row does not depend on another one's"


def test_what_comes_out_may_be_written_to():
    case = case_of(*CASES[0])
    block, x = case.block(), case.inputs(9)
    y, _ = case.call(block, x)
    y.add_(1)
    assert torch.equal(y, case.call(block, x)[0] + 1)
    y.sum().backward()


def test_the_state_after_a_call_can_be_differentiated_twice():
    case = case_of(*CASES[0])
    block, x = case.block(), case.inputs(9).requires_grad_()

    def gradient(x):
        _, after = case.call(block, x)
        learned = [tensor for tensor in after.values() if tensor.requires_grad]
        return torch.autograd.grad(along(learned), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, (x,), fast_mode=True, atol=1e-5, rtol=1e-3)


@pytest.mark.first_by_default
@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("variant", ["gating_mlp", "ttt_linear"])
def test_a_compiled_block_refuses_in_words(variant):
    case = case_of(variant, {"chunk": 4})
    block, x = case.block(), case.inputs(9).requires_grad_()
    case.call(block, x)  # the first call checks the dtypes
    real = torch.compile
    with mock.patch("torch.compile", lambda function, dynamic: real(function, backend="aot_eager", dynamic=dynamic)):
        block.compile_compute()
    y, after = case.call(block, x)
    carried = [tensor for tensor in after.values() if tensor.requires_grad]
    for loss in (y.sum(), along(carried)):
        for backward in (lambda loss: loss.backward(create_graph=True), lambda loss: torch.autograd.grad(
            loss, x, create_graph=True
        )):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"is compiled, and has no second derivatives.*compile: false"):
                backward(loss)
    torch.autograd.grad(case.call(block, x)[0].sum(), [x, *block.parameters()])
