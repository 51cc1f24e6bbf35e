"""Checks of a block's environment: modes of torch, copies, parameters that change or cannot be sharded."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moshi_ttt.core import state as states
from moshi_ttt.core.block import SequenceBlock, SiteKind
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.testing.case import BlockCase, assert_equal


def check_other_modes(case: BlockCase) -> None:
    """A block that was run on fake tensors, under their mode on tensors with values, or in inference mode, then
    computes what a fresh one does.

    Whatever it keeps between calls is not of that mode.
    """
    x = case.inputs(case.chunk + 1)
    used, fresh, causal = case.block(), case.block(), case.causal
    valued = states.clone(used.init_state(len(x)))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        case.call(used, case.inputs(x.shape[1]))
        case.call(used, x)
        if causal:
            state = used.allocate_state(len(x))
            case.step(used, case.inputs(1), state)
            case.step(used, x[:, :1], valued)
    with torch.inference_mode():
        case.call(used, x)
        if causal:
            case.step(used, x[:, :1], used.allocate_state(len(x)))
    _compare(case, used, fresh, x, "after fake tensors and inference mode")


def check_figures_under_autocast(case: BlockCase) -> None:
    """``statistics``, ``inner_losses``, ``recent_losses`` and ``drift`` are bit-equal under an autocast."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    if block.kind is SiteKind.FEED_FORWARD and block.roles.param is not torch.bfloat16:
        return  # refused: it would round the host's own MLP

    def figures() -> dict[str, Tensor]:
        measured = {f"statistic {name!r}": tensor for name, tensor in block.statistics(x, case.context(x)).items()}
        losses = block.inner_losses(x, case.context(x))
        measured |= {f"inner loss {name!r}": t for name, t in losses.items()} | {"drift": block.drift(state)}
        recent = block.recent_losses(x, state, case.context(x))
        return measured if recent is None else measured | {"recent losses": recent}

    with torch.no_grad():
        _, state = case.call(block, x)
        expected = figures()
        with torch.autocast(x.device.type, torch.bfloat16):
            found = figures()
    for name, tensor in expected.items():
        assert_equal(found[name].nan_to_num(), tensor.nan_to_num(), f"{name} under an autocast")


def check_copies(case: BlockCase) -> None:
    """A block that has streamed can be copied, pickled and saved whole; the copy computes the same, bit for bit.

    A class that no module has by its name (one made inside a function) cannot be pickled: it is copied alone.
    """
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    case.call(block, x)
    if case.causal:
        case.step(block, x[:, :1], block.allocate_state(len(x)))
    copies = {"copy.deepcopy": copy.deepcopy(block)}
    made = type(block)
    if getattr(sys.modules.get(made.__module__), made.__qualname__, None) is made:
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        copies |= {
            "pickle": pickle.loads(pickle.dumps(block)), "torch.save": torch.load(file, weights_only=False),
        }  # fmt: skip
    for name, other in copies.items():
        _compare(case, other, block, x, f"a copy by {name}")


def check_parameter_dimensions(case: BlockCase) -> None:
    """Every parameter has a dimension: one without cannot be sharded."""
    for name, parameter in case.block().named_parameters():
        assert parameter.dim() > 0, f"parameter {name!r} has no dimension and cannot be sharded: give it the shape [1]"


def check_form(case: BlockCase) -> None:
    """A call gives an output of its input's shape and dtype, and a state of the names, shapes and dtypes that a stream
    begins with. It writes to nothing that it is given.
    """
    block, x = case.block(), case.inputs(case.chunk + 1)
    with torch.no_grad():
        y, state = case.call(block, x)
    assert y.shape == x.shape, f"the output has shape {tuple(y.shape)}, and the input {tuple(x.shape)} [B, T, D]"
    assert y.dtype == x.dtype, f"the output is {y.dtype}, and the input {x.dtype}"
    begun = block.init_state(len(x))
    assert state.keys() == begun.keys(), (
        f"compute returns a state of {sorted(state)}, and init_state of {sorted(begun)}"
    )
    for name, tensor in begun.items():
        found, wanted = ((tuple(each.shape), each.dtype) for each in (state[name], tensor))
        assert found == wanted, f"compute returns {name!r} as {found}, and init_state as {wanted}"
    if not case.causal:
        return
    given = {"x": x, **{f"state {name!r}": tensor for name, tensor in state.items()}}
    before = states.clone(given)
    with torch.no_grad():
        case.call(block, x, state)
    for name, tensor in given.items():
        assert_equal(tensor, before[name], f"a call wrote to the {name} that it was given")


def _scale(block: SequenceBlock) -> None:
    for parameter in block.parameters():
        parameter.mul_(1.25)


def _scale_data(block: SequenceBlock) -> None:
    for parameter in block.parameters():
        parameter.data.mul_(0.75)


def _other_data(block: SequenceBlock) -> None:
    for parameter in block.parameters():
        parameter.data = 1.25 * parameter.data


def _replace(block: SequenceBlock) -> None:
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(0.75 * parameter.detach(), parameter.requires_grad))


_CHANGES: dict[str, Callable[[SequenceBlock], None]] = {
    "written to in place": _scale, "written to by .data": _scale_data, "given other .data": _other_data,
    "replaced": _replace,
}  # fmt: skip


@torch.no_grad()
def check_changed_parameters(case: BlockCase) -> None:
    """A parameter that changes in the middle of a stream takes effect in the next step, bit for bit, also where a host
    lets the block keep its casts.
    """
    if not case.causal:
        return
    block, x = case.block(), case.inputs(3 * len(_CHANGES))
    state, casts = block.allocate_state(len(x)), ParameterCasts(block)
    tokens = iter(x.split(1, dim=1))
    for name, change in _CHANGES.items():
        for _ in range(2):
            case.step(block, next(tokens), state, casts=casts)
        change(block)
        fresh, expected, token = case.block(), states.clone(state), next(tokens)
        for parameter, changed in zip(fresh.parameters(), block.parameters(), strict=True):
            parameter.copy_(changed)
        wanted = case.step(fresh, token, expected)
        assert_equal(case.step(block, token, state, casts=casts), wanted, f"parameters {name}: the next step")
        for key, tensor in expected.items():
            assert_equal(state[key], tensor, f"parameters {name}: the next step, state {key!r}")


def _compare(case: BlockCase, block: SequenceBlock, expected: SequenceBlock, x: Tensor, what: str) -> None:
    """Calls and streams of two blocks are bit-equal."""
    assert_equal(case.call(block, x)[0], case.call(expected, x)[0], f"{what}: a call")
    if not case.causal:
        return
    (y, state), (wanted, final) = (case.stream(each, x.split(1, dim=1)) for each in (block, expected))
    assert_equal(y, wanted, f"{what}: streamed")
    for name, tensor in final.items():
        assert_equal(state[name], tensor, f"{what}: streamed, state {name!r}")
