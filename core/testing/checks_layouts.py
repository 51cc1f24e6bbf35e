"""Checks of memory layouts: of activations and states, of parameters, of the buffers of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.testing.case import BlockCase, assert_close, assert_equal, assert_states_close


def check_layouts(case: BlockCase) -> None:
    """Equal values laid out otherwise in memory give equal results.

    A call computes on one layout of the state, whatever it was given, so states that differ in layout alone give
    bit-equal results: what starts from an expanded initial state and what was reset row by row compute the same. On the
    developer's CPU a product over other strides or from another address may well round alike; the layout that
    ``compute`` sees does not depend on the CPU. Activations laid out otherwise give results within the tolerance.
    """
    block, x = case.block(), case.inputs(case.chunk + 2)
    with torch.no_grad():
        expected, final = case.call(block, x)
        for name, given in layouts(x).items():
            y, after = case.call(block, given)
            assert_close(y, expected, case.tolerance, f"activations {name}")
            assert_states_close(after, final, case.tolerance, f"activations {name}")
        if not case.causal:
            return
        seen: list[dict[str, tuple[object, ...]]] = []
        compute = block.compute

        def recording(x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
            # Strides, and how far the address is from a multiple of the alignment, in bytes.
            seen.append({n: (t.stride(), t.data_ptr() % states.ALIGNMENT) for n, t in (state or {}).items()})
            return compute(x, state, context)

        block.compute = recording  # type: ignore[method-assign]  # this block's own, before the class's
        rows = x.shape[0]
        _, used = case.call(block, x, block.init_state(rows))
        everyone = torch.ones(rows, dtype=torch.bool)
        fresh, _ = case.call(block, x, block.init_state(rows))
        reset, _ = case.call(block, x, used, reset=everyone)
        assert_equal(reset, fresh, "a reset in the context, against a fresh stream")
        for name in ("expanded", "contiguous", "offset by one element", "transposed"):
            state = {key: layouts(tensor).get(name, tensor) for key, tensor in block.init_state(rows).items()}
            y, _ = case.call(block, x, state)
            assert_equal(y, fresh, f"a state laid out {name}")
    found = {tuple(sorted(each.items())) for each in seen}
    assert len(found) == 1, f"compute saw the same state in several memory layouts: {found}"


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The values of ``tensor [B, ...]`` laid out in memory in other ways, by the name of each."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    offset = storage[1:].view(tensor.shape).copy_(tensor)
    found = {"contiguous": tensor.clone(memory_format=torch.contiguous_format), "offset by one element": offset}
    if tensor.dim() > 1:
        found["transposed"] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if torch.equal(tensor, tensor[:1].expand_as(tensor)):
        found["expanded"] = tensor[:1].clone().expand_as(tensor)
    return found


def check_parameter_layouts(case: BlockCase) -> None:
    """Parameters that are not contiguous (a transposed view, every second number) train and stream as others do."""
    block, plain, x = case.block(), case.block(), case.inputs(2 * case.chunk + 1)
    for parameter in block.parameters():
        parameter.data = _strided(parameter.data)
    y, _ = case.call(block, x)
    expected, _ = case.call(plain, x)
    assert_close(y, expected, case.tolerance, "parameters that are not contiguous")
    y.double().square().mean().backward()
    expected.double().square().mean().backward()
    for (name, parameter), other in zip(block.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert parameter.grad is not None, f"parameter {name!r} that is not contiguous has no gradient"
            assert_close(parameter.grad, other.grad, case.tolerance, f"gradient of {name!r}, not contiguous")
    if case.causal:
        outputs = [case.stream(each, x.split(1, dim=1))[0] for each in (block, plain)]
        assert_close(outputs[0], outputs[1], case.tolerance, "parameters that are not contiguous, streamed")


def check_buffer_layouts(case: BlockCase) -> None:
    """A step refuses a buffer that is not contiguous, where writes to a copy would be lost, and then writes nothing."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    state = block.allocate_state(len(x))
    for name, tensor in state.items():
        strided = _strided(tensor)
        if strided.is_contiguous():
            continue
        given = {**state, name: strided}
        before = states.clone(given)
        for length in (1, 2):
            refusal = ""
            try:
                case.step(block, x[:, :length], given)
            except ContextError as raised:
                refusal = str(raised)
            assert repr(name) in refusal, f"a step of {length} tokens took a state whose {name!r} is not contiguous"
        for part, buffer in before.items():
            assert_equal(given[part], buffer, f"state {part!r} after a step that was refused for {name!r}")


def _strided(tensor: Tensor) -> Tensor:
    """The values of ``tensor``, every second number of a storage, first and last dimension exchanged in it."""
    if tensor.dim() < 2:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return torch.stack([tensor.transpose(0, -1)] * 2, dim=-1)[..., 0].transpose(0, -1)
