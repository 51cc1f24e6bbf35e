"""Checks of test-time updates: disabled, forgotten, at another inner learning rate."""

from __future__ import annotations

import torch

from moshi_ttt.core import state as states
from moshi_ttt.core.state_ranges import is_whole, range_problems
from moshi_ttt.core.testing.case import BlockCase, assert_close, assert_equal


def check_updates_off(case: BlockCase) -> None:
    """With updates off a call does not change the memory: over whole chunks it stays the learned initial one.

    Row by row too: a row whose updates are off is as with updates off for all, the others are as with updates on.
    """
    block, x = case.block(), case.inputs(2 * case.chunk)
    mask = torch.arange(x.shape[0]) != 0  # row 0 is off
    with torch.no_grad():
        learned, on = case.call(block, x)
        frozen, kept = case.call(block, x, updates=False)
        mixed, after = case.call(block, x, updates=mask)
        for name, tensor in block.init_state(x.shape[0]).items():
            if tensor.is_floating_point() and name in block.memory_names():
                assert_equal(kept[name], tensor, f"updates are off, state {name!r}")
                assert_equal(after[name][0], tensor[0], f"updates of row 0 are off, its state {name!r}")
                assert_equal(after[name][1:], on[name][1:], f"updates of row 0 are off, other rows' state {name!r}")
    assert not torch.equal(learned, frozen), "updates on and off give the same output"
    assert_equal(mixed[0], frozen[0], "updates of row 0 are off, its output")
    assert_equal(mixed[1:], learned[1:], "updates of row 0 are off, other rows' output")
    if case.causal:
        for what, updates, expected in (("off", False, frozen), ("off for row 0", mask, mixed)):
            state = block.allocate_state(x.shape[0])
            start = states.clone(state)
            streamed = torch.cat([case.step(block, t, state, updates=updates) for t in x.split(1, dim=1)], dim=1)
            assert_close(streamed, expected, case.tolerance, f"streamed with updates {what}")
            for name in block.memory_names():
                if start[name].is_floating_point():
                    kept_row = f"streamed with updates {what}, state {name!r} of row 0"
                    assert_equal(state[name][0], start[name][0], kept_row)


def check_memory(case: BlockCase) -> None:
    """``memory_names`` names entries of the state; forgetting resets them alone, and then updates start afresh."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    names, start = block.memory_names(), block.init_state(x.shape[0])
    assert names, "memory_names is empty: nothing of the state is memory"
    assert names <= start.keys(), f"memory_names names {sorted(names - start.keys())}, which the state does not have"
    if not case.causal:
        return
    with torch.no_grad():
        _, used = case.call(block, x)
        written = states.clone(used)
        forgotten = block.forget(used)
        assert forgotten.keys() == used.keys()
        for name, tensor in forgotten.items():
            expected = start[name] if name in names else written[name]
            assert_equal(tensor, expected, f"state {name!r} after forgetting")
            assert_equal(used[name], written[name], f"forgetting wrote into state {name!r}")
        y, _ = case.call(block, x, forgotten)
        assert bool(y.isfinite().all()), "outputs are not finite after forgetting"
        others = written.keys() - names
        _, kept = case.call(block, x, updates=False)
        for name in others:
            assert_equal(kept[name], written[name], f"state {name!r} is not memory, and depends on updates")


def check_inner_lr_factor(case: BlockCase) -> None:
    """A block follows ``inner_lr_factor`` where it declares ``scales_inner_lr``, and ignores it elsewhere; 0 is off."""
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    outputs = {}
    with torch.no_grad():
        for factor in (1.0, 1e-3, 0.0):  # small: a clip may undo half
            block.inner_lr_factor = factor
            outputs[factor], _ = case.call(block, x)
        block.inner_lr_factor = 1.0
        off, _ = case.call(block, x, updates=False)
    if block.scales_inner_lr:
        assert not torch.equal(outputs[1.0], outputs[1e-3]), "scales_inner_lr is declared and has no effect"
        assert_close(outputs[0.0], off, case.tolerance, "an inner learning rate of 0, against updates off")
    else:
        for factor in (1e-3, 0.0):
            assert_equal(outputs[factor], outputs[1.0], "inner_lr_factor has an effect: declare scales_inner_lr")


def check_state_ranges(case: BlockCase) -> None:
    """The declared ranges hold along every stream, and a step from each bound works: nothing else may be restored."""
    if not case.causal:
        return
    block, x = case.block(), case.inputs(2 * case.chunk + 1)
    ranges = block.state_ranges()
    state = block.allocate_state(x.shape[0])
    whole = {name for name, tensor in state.items() if is_whole(tensor)}
    assert set(ranges) == whole, f"ranges are declared for {sorted(ranges)}, and whole numbers are {sorted(whole)}"
    for t in range(x.shape[1]):
        token = x[:, t : t + 1].clone()
        if t % 3 == 1:
            token[0] = float("nan")
        case.step(block, token, state, updates=torch.arange(x.shape[0]) != t % 2)
        problems = list(range_problems(ranges, state))
        assert not problems, f"after {t + 1} tokens: {problems}"
    for name, allowed in ranges.items():
        for value in (allowed.least, allowed.most):
            at_bound = states.clone(state)
            at_bound[name].fill_(value)
            if allowed.up_to is not None:
                at_bound[allowed.up_to].fill_(value)
            for other, theirs in ranges.items():
                if theirs.up_to is not None:
                    at_bound[other].copy_(torch.minimum(at_bound[other], at_bound[theirs.up_to]))
            assert not list(range_problems(ranges, at_bound)), f"{name} = {value}"
            try:
                case.step(block, x[:, :1], states.clone(at_bound))
                with torch.no_grad():
                    case.call(block, x[:, :1], at_bound)
            except (IndexError, RuntimeError) as error:
                raise AssertionError(f"{name} = {value} is declared as allowed, and a step raises: {error}") from error
