"""Checks of training: nothing written in forward, right gradients, checkpointing, the trainable set (rules 4, 5, 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.gated_mlp import input_projections, output_projection
from moshi_ttt.core.testing.case import BlockCase, Shape, assert_close, assert_equal, assert_states_close


def _gradients(block: SequenceBlock) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad(set_to_none=True)
    return found


def _loss(y: Tensor, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (y.float() * torch.randn(y.shape, generator=generator)).sum()


def check_parameters_unwritten(case: BlockCase) -> None:
    """Forward, backward, streaming and resetting leave every parameter bit-equal."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    y, state = case.call(block, x)
    _loss(y).backward()
    if block.causal:
        buffers = block.allocate_state(x.shape[0])
        case.step(block, x[:, :1], buffers)
        block.reset_state(buffers, torch.ones(x.shape[0], dtype=torch.bool))
        case.call(block, x, {name: tensor.detach() for name, tensor in state.items()})
    for name, parameter in block.named_parameters():
        assert_equal(parameter.detach(), before[name], f"parameter {name!r} was written to")


def check_checkpointing(case: BlockCase) -> None:
    """Gradients with activation checkpointing are bit-equal to those without."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    y, _ = case.call(block, x)
    _loss(y).backward()
    plain = _gradients(block)
    wrapped: Any = checkpoint(lambda t: case.call(block, t)[0], x.clone().requires_grad_(), use_reentrant=False)
    assert_equal(wrapped.detach(), y.detach(), "output under checkpointing")
    _loss(wrapped).backward()
    for name, gradient in _gradients(block).items():
        assert_equal(gradient, plain[name], f"gradient of {name!r} under checkpointing")


def check_two_forwards(case: BlockCase) -> None:
    """Two forwards before one backward give the sum of the gradients of each alone."""
    block = case.block()
    first, second = case.inputs(2 * case.chunk, seed=1), case.inputs(2 * case.chunk, seed=2)
    apart = []
    for x in (first, second):
        _loss(case.call(block, x)[0]).backward()
        apart.append(_gradients(block))
    both = [case.call(block, x)[0] for x in (first, second)]
    (_loss(both[0]) + _loss(both[1])).backward()
    for name, gradient in _gradients(block).items():
        assert_close(gradient, apart[0][name] + apart[1][name], case.tolerance, f"gradient of {name!r}, two forwards")


def check_reset_before_backward(case: BlockCase) -> None:
    """Resetting and streaming between a forward and its backward does not disturb the backward."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk)
    state = block.allocate_state(x.shape[0])
    _loss(case.call(block, x, state)[0]).backward()
    plain = _gradients(block)
    y, _ = case.call(block, x, state)
    streamed = block.allocate_state(x.shape[0])
    case.step(block, x[:, :1], streamed)
    block.reset_state(streamed, torch.ones(x.shape[0], dtype=torch.bool))
    _loss(y).backward()
    for name, gradient in _gradients(block).items():
        assert_equal(gradient, plain[name], f"gradient of {name!r} after a reset in between")


def check_step_gradient(case: BlockCase) -> None:
    """A step has no gradient: backward raises where one would be lost, and nowhere else."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(1)
    if block.info.mlp is not None:
        for part in (*input_projections(block.info.mlp), output_projection(block.info.mlp)):
            part.requires_grad_(False)
    for what, trained, given in (
        ("the block's parameters", True, x),
        ("the input", False, x.clone().requires_grad_()),
        ("no tensor", False, x),
    ):
        block.requires_grad_(trained)
        state = block.allocate_state(x.shape[0])
        with torch.no_grad():
            expected = case.step(block, given, block.allocate_state(x.shape[0]))
        y = case.step(block, given, state)
        assert_equal(y.detach(), expected, "a step with gradients enabled, against one without")
        assert not any(tensor.requires_grad for tensor in state.values()), "a streamed state requires a gradient"
        lost = what != "no tensor" and any(source.requires_grad for source in (given, *block.parameters()))
        assert y.requires_grad == lost, f"{what} requires a gradient; that the step's output does is {y.requires_grad}"
        if not lost:
            continue
        said = "nothing"
        try:
            _loss(y).backward()
        except ContextError as error:
            said = str(error)
        assert "streamed" in said, f"{what} requires a gradient, a step loses it, and its backward says: {said}"


def check_detached_state(case: BlockCase) -> None:
    """A state that is cut from the graph has the values of one that is not, and the call's gradients are the same."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 1).requires_grad_()
    with torch.no_grad():
        _, start = case.call(block, case.inputs(case.chunk + case.chunk // 2 + 1, seed=9))
    for name, state in (("the start", None), ("a state", start)):
        found = []
        for detach in (False, True):
            x.grad = None
            y, after = case.call(block, x, state, detach_state=detach)
            _loss(y).backward()
            found.append((y, x.grad, after, _gradients(block)))
        (y, gradient, after, learned), (y_cut, gradient_cut, after_cut, learned_cut) = found
        assert_equal(y_cut, y, f"from {name}, the state detached: outputs")
        assert gradient is not None
        assert gradient_cut is not None
        assert_equal(gradient_cut, gradient, f"from {name}, the state detached: gradient of the input")
        assert_states_close(after_cut, after, case.tolerance, f"from {name}, the state detached")
        graphs = [part for part, tensor in after_cut.items() if tensor.requires_grad]
        assert not graphs, f"from {name}: detached state {graphs} is in a graph"
        for parameter, expected in learned.items():
            assert_equal(
                learned_cut[parameter], expected, f"from {name}, the state detached: gradient of {parameter!r}"
            )


def check_trainable_set(case: BlockCase) -> None:
    """Every parameter requires a gradient, has one by the second step over three chunks, and then moves.

    Three: what decides how a chunk is written by what an earlier one left shows in a third.
    """
    block = case.block()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    largest = dict.fromkeys(before, 0.0)
    for step in range(2):
        optimizer.zero_grad()
        _loss(case.call(block, case.inputs(3 * case.chunk, seed=20 + step))[0]).backward()
        for name, parameter in block.named_parameters():
            assert parameter.requires_grad, f"parameter {name!r} does not require a gradient"
            if parameter.grad is not None:
                largest[name] = max(largest[name], float(parameter.grad.abs().max()))
        optimizer.step()
    dead = {name: value for name, value in largest.items() if not value > 1e-9}
    assert not dead, f"parameters without a gradient by step 2: {dead}"
    still = [n for n, p in block.named_parameters() if torch.equal(p.detach(), before[n])]
    assert not still, f"parameters that did not move: {still}"


def check_gradients_numerically(case: BlockCase) -> None:
    """Gradients of input and parameters against finite differences, float64, an odd length."""
    if case.dtype != torch.float64:
        return
    heads = 2
    small = case.at(shape=Shape(dim=heads * 4, heads=heads, batch=2))
    block = small.block()
    names = [name for name, _ in block.named_parameters()]
    length = 2 * case.chunk + 1 if case.chunk <= 8 else case.chunk + 1
    x = small.inputs(length).requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        arguments = (x, None, small.context(x))
        y: Tensor = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), arguments)[0]
        return y

    parameters = [parameter.detach().clone().requires_grad_() for parameter in block.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, atol=1e-5, rtol=1e-3)


def check_second_derivatives(case: BlockCase) -> None:
    """The gradient's own derivative is right or refused (RuntimeError): by ``autograd.grad`` and by ``backward``.

    Against finite differences of the gradient, float64, in one random direction: of a call from the start, of one that
    continues a state, and of one under activation checkpointing.
    """
    if case.dtype != torch.float64:
        return
    small = case.at(shape=Shape(dim=8, heads=2, batch=2))
    block = small.block()
    names = [name for name, _ in block.named_parameters()]
    length = 2 * case.chunk + 1 if case.chunk <= 8 else case.chunk + 1
    x = small.inputs(length)
    start = {} if not block.causal else small.call(block, small.inputs(case.chunk + 1, seed=7))[1]
    learned = {name: tensor.detach() for name, tensor in start.items() if tensor.is_floating_point()}
    leaves = [x, *(parameter.detach() for parameter in block.parameters())]

    def loss(x: Tensor, *given: Tensor) -> Tensor:
        state = {**start, **dict(zip(learned, given[len(names) :], strict=True))} if given[len(names) :] else None
        parameters = dict(zip(names, given[: len(names)], strict=True))
        y, _ = torch.func.functional_call(block, parameters, (x, state, small.context(x)))
        total: Tensor = _loss(y) + y.square().sum()
        return total

    def checkpointed(*given: Tensor) -> Any:
        return checkpoint(loss, *given, use_reentrant=False)

    _check_second_derivatives(loss, leaves, "of a call from the start")
    _check_second_derivatives(checkpointed, leaves, "under checkpointing")
    if learned:
        _check_second_derivatives(loss, [*leaves, *learned.values()], "of a call that continues a state")


def _check_second_derivatives(loss: Callable[..., Tensor], at: Sequence[Tensor], what: str) -> None:
    generator = torch.Generator().manual_seed(8)
    direction = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in at]
    step = 1e-5

    def gradients(moved: float, create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [(leaf + moved * d).requires_grad_() for leaf, d in zip(at, direction, strict=True)]
        found = torch.autograd.grad(loss(*leaves), leaves, create_graph=create_graph, materialize_grads=True)
        return leaves, list(found)

    expected = [(a - b) / (2 * step) for a, b in zip(gradients(step)[1], gradients(-step)[1], strict=True)]
    largest = max(float(tensor.detach().abs().max()) for tensor in expected)
    for form in ("autograd.grad", "backward"):
        try:
            leaves, first = gradients(0.0, create_graph=True)
            along = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)]).sum()
            if form == "backward":
                along.backward()
                second = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            else:
                second = list(torch.autograd.grad(along, leaves, materialize_grads=True))
        except RuntimeError:
            continue  # refused
        wrong = max(float((a - b).detach().abs().max()) for a, b in zip(second, expected, strict=True)) / largest
        assert wrong <= 1e-5, f"second derivatives {what}, by {form}: relative error {wrong:.2g}, and not refused"
