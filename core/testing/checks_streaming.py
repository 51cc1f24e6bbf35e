"""Checks of streams: causality, cuts, rows, masks, resets, constant cost, state dtype (rules 1, 2, 3, 5, 9, 11, 12)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.core import state as states
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.testing.case import (
    BlockCase,
    assert_close,
    assert_equal,
    assert_states_close,
)

LONG_STREAM_STEPS = 1_000


def check_causality(case: BlockCase) -> None:
    """Perturbing token t leaves outputs before t bit-equal, and changes some output at or after t."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(3 * case.chunk + 1)
    with torch.no_grad():
        base, _ = case.call(block, x)
        for t in (1, case.chunk // 2, case.chunk - 1, case.chunk, 2 * case.chunk + 1, 3 * case.chunk):
            changed = x.clone()
            changed[:, t] += 1.0
            y, _ = case.call(block, changed)
            assert_equal(y[:, :t], base[:, :t], f"token {t} changed, outputs before it")
            assert not torch.equal(y[:, t:], base[:, t:]), f"token {t} changed and nothing after it did"


def check_splits(case: BlockCase) -> None:
    """Any cut of a sequence gives the outputs and the final state of one call, carried and streamed."""
    if not case.causal:
        return
    size = case.chunk
    length = 3 * size + 7
    block, x = case.block(), case.inputs(length)
    generator = torch.Generator().manual_seed(3)
    random_cuts = (torch.randperm(length - 1, generator=generator)[:4] + 1).sort().values.tolist()
    with torch.no_grad():
        whole, final = case.call(block, x)
        for cuts in (
            list(range(1, length)),
            list(range(max(1, size - 1), length, max(1, size - 1))),
            list(range(size, length, size)),
            list(range(size + 1, length, size + 1)),
            random_cuts,
        ):
            pieces = _pieces(x, cuts)
            y, state = _carried(case, block, pieces)
            assert_close(y, whole, case.tolerance, f"carried over cuts {cuts}")
            assert_states_close(state, final, case.tolerance, f"carried over cuts {cuts}")
            y, state = case.stream(block, pieces)
            assert_close(y, whole, case.tolerance, f"streamed over cuts {cuts}")
            assert_states_close(state, final, case.tolerance, f"streamed over cuts {cuts}")


def check_every_prefix(case: BlockCase) -> None:
    """The state after each streamed token is that of one call over as many tokens."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    state = block.allocate_state(x.shape[0])
    for t in range(x.shape[1]):
        case.step(block, x[:, t : t + 1], state)
        with torch.no_grad():
            _, expected = case.call(block, x[:, : t + 1])
        assert_states_close(state, expected, case.tolerance, f"after {t + 1} tokens")


def check_unwanted_state(case: BlockCase) -> None:
    """A call that does not ask for the state after it gives the same output, whatever it started from."""
    block, rows = case.block(), case.shape.batch
    mask = torch.arange(rows) != 0
    starts: list[dict[str, Any]] = [{}]
    if case.causal:
        with torch.no_grad():
            _, state = case.call(block, case.inputs(case.chunk // 2 + 1, seed=8))
        starts += [{"state": state}, {"reset": mask}, {"state": state, "reset": mask, "exec_mask": ~mask}]
    for start in starts:
        for length in (1, case.chunk - 1 or 1, case.chunk, 2 * case.chunk + 1):
            x = case.inputs(length)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a block may warn that it is not trained on so few tokens
                wanted, _ = case.call(block, x, **start)
                unwanted, _ = case.call(block, x, want_state=False, **start)
            what = f"{length} tokens from {sorted(start) or 'the start'}, without asking for the state"
            assert_close(unwanted, wanted, case.tolerance, what)


def _pieces(x: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    bounds = [0, *cuts, x.shape[1]]
    return [x[:, a:b] for a, b in pairwise(bounds)]


def _carried(case: BlockCase, block: SequenceBlock, pieces: Sequence[Tensor]) -> tuple[Tensor, BlockState]:
    state: BlockState | None = None
    outputs = []
    for piece in pieces:
        y, state = case.call(block, piece, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def check_step_in_place(case: BlockCase) -> None:
    """Streaming writes into the given buffers and nowhere else: addresses stay (a captured graph depends on it)."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    state = block.allocate_state(x.shape[0])
    before = states.clone(state)
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    for t in range(x.shape[1]):
        case.step(block, x[:, t : t + 1], state)
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses, "a state buffer was replaced"
    moved = [name for name in state if not torch.equal(state[name], before[name])]
    assert moved, "two chunks were streamed and no state changed"
    given = states.clone(state)
    with torch.no_grad():
        case.call(block, x, state)
    for name in state:
        assert_equal(state[name], given[name], f"a functional call wrote into its state {name!r}")


def check_rows(case: BlockCase) -> None:
    """A row equals the same stream alone; changing one row leaves the others bit-equal."""
    block, x = case.block(), case.inputs(2 * case.chunk + 3)
    with torch.no_grad():
        y, final = case.call(block, x)
        for row in range(x.shape[0]):
            alone, state = case.call(block, x[row : row + 1])
            assert_close(alone[0], y[row], case.tolerance, f"row {row} alone")
            one = {name: tensor[row : row + 1] for name, tensor in final.items()}
            assert_states_close(state, one, case.tolerance, f"row {row} alone")
        changed = x.clone()
        changed[0] = case.inputs(x.shape[1], seed=9)[0]
        other, after = case.call(block, changed)
        assert_equal(other[1:], y[1:], "row 0 changed, the other rows' outputs")
        assert not torch.equal(other[0], y[0]), "row 0 changed and its output did not"
        for name, tensor in after.items():
            assert_equal(tensor[1:], final[name][1:], f"row 0 changed, the other rows' state {name!r}")


def check_exec_mask(case: BlockCase) -> None:
    """A masked row's state is bit-equal afterwards, and it continues as without that call, in both regimes."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 2)
    rows = x.shape[0]
    others = torch.arange(rows) != 0
    undisturbed, streamed = block.allocate_state(rows), block.allocate_state(rows)
    carried = block.allocate_state(rows)
    for t in range(x.shape[1]):
        token = x[:, t : t + 1]
        if t % 3 == 1:  # an interruption that row 0 does not take part in
            noise = case.inputs(1, seed=100 + t)
            held = {name: tensor[0].clone() for name, tensor in streamed.items()}
            case.step(block, noise, streamed, exec_mask=others)
            with torch.no_grad():
                _, after = case.call(block, noise, carried, exec_mask=others)
            for name, tensor in held.items():
                assert_equal(streamed[name][0], tensor, f"a masked row's streamed state {name!r}")
                assert_equal(after[name][0], carried[name][0], f"a masked row's carried state {name!r}")
            carried = after
        expected = case.step(block, token, undisturbed)
        assert_equal(case.step(block, token, streamed)[0], expected[0], f"row 0, streamed token {t}")
        with torch.no_grad():
            y, carried = case.call(block, token, carried)
        assert_close(y[0], expected[0], case.tolerance, f"row 0, carried token {t}")


def check_reset(case: BlockCase) -> None:
    """A reset row equals a fresh stream bit for bit, resetting twice changes nothing, and other rows do not change."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(case.chunk + 2)
    fresh, state = block.allocate_state(x.shape[0]), block.allocate_state(x.shape[0])
    for t in range(x.shape[1]):
        case.step(block, x[:, t : t + 1], state)
    untouched = states.clone(state)
    mask = torch.arange(x.shape[0]) == 0
    for attempt in ("once", "twice"):
        block.reset_state(state, mask)
        for name, tensor in state.items():
            assert_equal(tensor[0], fresh[name][0], f"reset {attempt}: state {name!r} of the row")
            assert_equal(tensor[1:], untouched[name][1:], f"reset {attempt}: state {name!r} of the other rows")
    learned = block.allocate_state(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.5)
    relearned = block.allocate_state(1)
    if block.learned_state:
        moved = [name for name in learned if not torch.equal(learned[name], relearned[name])]
        assert moved, "the initial state is not a learned one"
    block.reset_state(state, torch.ones(x.shape[0], dtype=torch.bool))
    for name, tensor in state.items():
        assert_equal(tensor[:1], relearned[name], f"reset after training goes to other than the learned {name!r}")
    with torch.no_grad():
        y, _ = case.call(block, x, untouched, reset=torch.ones(x.shape[0], dtype=torch.bool))
        expected, _ = case.call(block, x, block.init_state(x.shape[0]))
    assert_equal(y, expected, "a reset in the context, against a fresh stream")


def check_no_host_read(case: BlockCase) -> None:
    """A step runs on fake tensors, which have no values: any ``.item()`` or branch on a tensor would raise."""
    if not case.causal:
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        block, x = case.block(), case.inputs(1)
        state = block.allocate_state(x.shape[0])
        mask = torch.ones(x.shape[0], dtype=torch.bool)
        case.step(block, x, state)
        case.step(block, x, state, exec_mask=mask)
        volume = mask.to(block.roles.output) if block.scales_output else 1.0
        case.step(block, x, state, updates=mask, volume=volume)  # as in every stream of a host
        case.step(block, x, state, token_mask=mask[:, None], starts=mask[:, None])
        block.reset_state(state, mask)


def check_state_is_float32(case: BlockCase) -> None:
    """State has the policy's dtype from call to call, and updates below a bfloat16 ulp survive in it."""
    block, x = case.block(), case.inputs(2 * case.chunk)
    expected = case.policy.roles(case.dtype).state
    if torch.finfo(expected).eps > 2.0**-23:
        return  # the policy asks for a coarse state
    with torch.no_grad():
        _, state = case.call(block, x)
    for name, tensor in state.items():
        if tensor.is_floating_point():
            assert tensor.dtype == expected, f"state {name!r} is {tensor.dtype}, the policy's state role is {expected}"
            assert torch.finfo(tensor.dtype).eps <= 2.0**-23, (
                f"state {name!r} is {tensor.dtype}: small updates are lost"
            )
    changed = [n for n, t in state.items() if t.is_floating_point() and not torch.equal(t, t.bfloat16().to(t.dtype))]
    assert changed, "every state value is a bfloat16 number: the state was rounded on its way"


@torch.inference_mode()
def check_long_stream(case: BlockCase, steps: int = LONG_STREAM_STEPS) -> None:
    """After a thousand steps the state is finite, and a step still runs the same operations on the same storage."""
    if not case.causal or case.dtype != torch.float32:  # one dtype: this is about cost and growth, and takes seconds
        return
    block, x = case.block(), case.inputs(64)
    state = block.allocate_state(x.shape[0])
    size = states.num_bytes(state)
    first = _operations(lambda: case.step(block, x[:, :1], state))
    for t in range(steps):
        case.step(block, x[:, t % 64 : t % 64 + 1], state)
    last = _operations(lambda: case.step(block, x[:, :1], state))
    assert first == last, f"a step's operations changed: {first - last} then, {last - first} now"
    assert states.num_bytes(state) == size, "the state grew"
    for name, tensor in state.items():
        norm = tensor.double().norm() if tensor.is_floating_point() else torch.tensor(0.0)
        assert torch.isfinite(norm), f"state {name!r} is not finite after {steps} steps"


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _operations(call: Callable[[], object]) -> Counter[str]:
    counter = _Count()
    with counter:
        call()
    return counter.calls
