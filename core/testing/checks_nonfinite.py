"""Checks of tokens that are not finite: what they change, and that later chunks update the memory again."""

from __future__ import annotations

import torch
from torch import Tensor

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.testing.case import BlockCase, assert_close, assert_equal, error

ROW = 1
"""The row of the batch that gets a bad token."""


def check_nonfinite_rows(case: BlockCase) -> None:
    """A token that is not finite, or huge, leaves the other rows bit-equal: outputs and state."""
    block, x = case.block(), case.inputs(_length(case))
    with torch.no_grad():
        sane, expected = case.call(block, x)
        for name, token in _bad_tokens(case).items():
            spoiled = x.clone()
            spoiled[ROW, _place(case)] = token
            y, after = case.call(block, spoiled)
            for row in (row for row in range(len(x)) if row != ROW):
                assert_equal(y[row], sane[row], f"{name} in row {ROW}, outputs of row {row}")
                for part, tensor in expected.items():
                    assert_equal(after[part][row], tensor[row], f"{name} in row {ROW}, state {part!r} of row {row}")


def check_nonfinite_recovery(case: BlockCase) -> None:
    """Where a block declares ``skips_nonfinite``: the update of a chunk with a token that is not finite is left out.

    Earlier outputs are bit-equal, the row is finite again from the next chunk on, the skipped update is counted, any
    cut of the sequence agrees, and no parameter's gradient becomes nan by a token whose output is not used. Where the
    row's updates are disabled none is left out, and none counted. Each kind of bad token has a row of one batch, whose
    row 0 has none.
    """
    block = case.block()
    if not block.skips_nonfinite:
        return
    size, bad, tokens = case.chunk, _place(case), _bad_tokens(case)
    ended = (bad // size + 1) * size
    sound = case.inputs(_length(case), batch=1 + len(tokens))
    x = sound.clone()
    x[1:, bad] = torch.stack(list(tokens.values()))
    with torch.no_grad():
        sane, _ = case.call(block, sound)
    y, after = case.call(block, x)
    first = bad if case.causal else bad - bad % size
    others = torch.arange(x.shape[1]) != bad
    for row, name in enumerate(("no bad token", *tokens)):
        if block.causal or not getattr(block.config, "bidirectional", False):
            assert_equal(y[row, :first], sane[row, :first], f"{name} at token {bad}, outputs before it")
        assert y[row, others].isfinite().all(), f"{name} at token {bad}: other outputs of its row are not finite"
        for part, tensor in after.items():
            assert tensor[row].isfinite().all(), f"{name} at token {bad}: state {part!r} is not finite afterwards"
    if after:
        counts = block.skipped_updates(after)
        expected = torch.ones_like(counts)
        expected[0] = 0
        assert_equal(counts, expected, f"no bad token, {', '.join(tokens)} at token {bad}: skipped updates")
    _check_gradients(block, y, others, f"{', '.join(tokens)} at token {bad}")
    _check_disabled(case, block, x, f"{', '.join(tokens)} at token {bad}, updates disabled")
    if case.causal:
        _check_cuts(case, block, x, bad, ended)


@torch.no_grad()
def _check_disabled(case: BlockCase, block: SequenceBlock, x: Tensor, what: str) -> None:
    for updates in (False, torch.arange(len(x)) == 0):
        _, state = case.call(block, x, updates=updates)
        if state:
            counts = block.skipped_updates(state)
            assert_equal(counts, torch.zeros_like(counts), f"{what}: skipped updates")
            for part, tensor in state.items():
                assert tensor.isfinite().all(), f"{what}: state {part!r} is not finite afterwards"
        if case.causal:
            state = block.allocate_state(len(x))
            for token in x.split(1, dim=1):
                case.step(block, token, state, updates=updates)
            counts = block.skipped_updates(state)
            assert_equal(counts, torch.zeros_like(counts), f"{what}: skipped updates, streamed")


def _check_cuts(case: BlockCase, block: SequenceBlock, x: Tensor, bad: int, ended: int) -> None:
    """Streaming, and a call that begins inside the bad token's chunk, skip and count as one call does."""
    with torch.no_grad():
        whole, final = case.call(block, x)
        for cut in (bad, bad + 1, ended):
            y, state = case.call(block, x[:, :cut])
            rest, state = case.call(block, x[:, cut:], state)
            _same(case, torch.cat([y, rest], dim=1), whole, f"cut at {cut}")
            assert_equal(block.skipped_updates(state), block.skipped_updates(final), f"cut at {cut}: skipped updates")
    streamed, state = case.stream(block, x.split(1, dim=1))
    _same(case, streamed, whole, "streamed")
    assert_equal(block.skipped_updates(state), block.skipped_updates(final), "streamed: skipped updates")
    for part, tensor in final.items():
        assert_close(state[part], tensor, case.tolerance, f"streamed: state {part!r}")


def _same(case: BlockCase, actual: Tensor, expected: Tensor, what: str) -> None:
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: other outputs are not finite"
    measured = error(actual[finite], expected[finite])
    assert measured <= case.tolerance, f"{what}: error {measured:.3g} above {case.tolerance:g}"


def _check_gradients(block: SequenceBlock, y: Tensor, others: Tensor, what: str) -> None:
    used = torch.where(others[:, None], y, 0).double()
    named = [(name, parameter) for name, parameter in block.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(used.square().mean(), [each for _, each in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        assert gradient is None or gradient.isfinite().all(), f"{what}: the gradient of {name!r} is not finite"


def _place(case: BlockCase) -> int:
    """The bad token: inside the second chunk, not its first."""
    return case.chunk + case.chunk // 2


def _length(case: BlockCase) -> int:
    return 4 * case.chunk + 1


def _bad_tokens(case: BlockCase) -> dict[str, Tensor]:
    """Activations ``[D]`` of a bad token, by what is bad about it."""
    sound = case.inputs(1, batch=1)[0, 0]
    values = {"nan": torch.nan, "inf": torch.inf, "a huge number": torch.finfo(case.dtype).max / 4}
    found = {name: torch.full_like(sound, value) for name, value in values.items()}
    found["nan in one channel"] = sound.clone()
    found["nan in one channel"][0] = torch.nan
    return found
