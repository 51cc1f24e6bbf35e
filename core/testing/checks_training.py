"""Checks of training: nothing written in forward, right gradients, checkpointing, the trainable set (rules 4, 5, 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.testing.case import BlockCase, Shape, assert_close, assert_equal


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
    """A step has no gradient to give: where one would be lost the backward raises, and elsewhere nothing is refused."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(1)
    if block.info.mlp is not None:
        for part in (block.info.mlp.linear_in, block.info.mlp.linear_out):
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


def check_trainable_set(case: BlockCase) -> None:
    """Every parameter requires a gradient, has one by the second step over two chunks, and then moves."""
    block = case.block()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    largest = dict.fromkeys(before, 0.0)
    for step in range(2):
        optimizer.zero_grad()
        _loss(case.call(block, case.inputs(2 * case.chunk, seed=20 + step))[0]).backward()
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
        y, _ = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), arguments)
        return y  # type: ignore[no-any-return]

    parameters = [parameter.detach().clone().requires_grad_() for parameter in block.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True, atol=1e-5, rtol=1e-3)
