"""Random blocks against the oracle: outputs, memory, gradients, and that no token depends on a later one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.testing import error
from tests.fuzz import oracle
from tests.fuzz.cases import Drawn, blocks, hybrid_options, leaves, memory_of, stream_of

TOLERANCE = 1e-10


def defined(block: SequenceBlock, x: Tensor, embeddings: Tensor, parameters: oracle.Parameters):
    """Outputs ``[B, T, D]``, and each row's memory where the block is causal, by the oracle."""
    outputs, memories = [], []
    for row, heard in zip(x, embeddings, strict=True):
        if getattr(block.config, "bidirectional", False):
            outputs.append(oracle.bidirectional(parameters, hybrid_options(block), row))
            continue
        stream = stream_of(block, parameters)
        outputs.append(stream.sequence(row, heard) if isinstance(stream, oracle.InPlace) else stream.sequence(row))
        memories.append(stream.memory())
    return torch.stack(outputs), memories


@given(drawn=blocks(), length=st.integers(1, 20))
def test_a_block_computes_its_definition(drawn: Drawn, length: int) -> None:
    case, block = drawn.case, drawn.block()
    x = case.inputs(length).requires_grad_()
    context = case.context(x)
    y, state = block(x, None, context)
    own = x.detach().clone().requires_grad_()
    parameters = leaves(block)
    expected, memories = defined(block, own, own.flip(-1), parameters)
    assert error(y, expected) < TOLERANCE, "outputs"
    for row, memory in enumerate(memories):
        for name, tensor in memory_of(block, state, row).items():
            assert error(tensor, memory[name]) < TOLERANCE, f"{name} of row {row}"

    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(drawn.seed), dtype=torch.float64)
    named = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
    actual = torch.autograd.grad((y * cotangent).sum(), [x, *named.values()], allow_unused=True)
    wanted = torch.autograd.grad(
        (expected * cotangent).sum(), [own, *(parameters[name] for name in named)], allow_unused=True
    )
    for name, a, b in zip(["x", *named], actual, wanted, strict=True):
        like = x if name == "x" else named[name]
        found, right = (torch.zeros_like(like) if each is None else each for each in (a, b))
        assert error(found, right) < TOLERANCE, f"gradient of {name}"

    if block.causal and length > 1:
        place = drawn.seed % length
        with torch.no_grad():
            changed = x.detach().clone()
            changed[:, place] += 1.0
            # The same embeddings before the place: they are a function of the same tokens.
            other, _ = block(changed, None, case.context(changed))
        assert torch.equal(other[:, :place], y.detach()[:, :place]), f"token {place} reaches outputs before it"
