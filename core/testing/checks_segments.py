"""Checks of masked tokens and of starts within a call, against each row's tokens computed alone (rules 2, 3, 11)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.testing.case import BlockCase, assert_close, assert_equal, assert_states_close

ROWS = 4


@dataclass(frozen=True)
class _Masked:
    """A call's tokens ``[B, T, D]``, which of them take part, and which start their row anew, each ``[B, T]`` bool."""

    x: Tensor
    token_mask: Tensor
    starts: Tensor

    @property
    def masks(self) -> dict[str, Tensor]:
        return {"token_mask": self.token_mask, "starts": self.starts}

    def documents(self, row: int) -> list[tuple[bool, list[int]]]:
        """The row's tokens that take part, cut at its starts; and of each part whether it goes on from the state."""
        found: list[tuple[bool, list[int]]] = [(True, [])]
        for t in range(self.x.shape[1]):
            if self.starts[row, t]:
                found.append((False, []))
            if self.token_mask[row, t]:
                found[-1][1].append(t)
        return found


def _masked_calls(case: BlockCase) -> list[_Masked]:
    """Two calls that follow each other: left padding, packed documents, holes, rows without a token; rows differ."""
    size = case.chunk
    length = 2 * size + 3
    mask, starts = torch.ones(ROWS, length, dtype=torch.bool), torch.zeros(ROWS, length, dtype=torch.bool)
    mask[0, : max(1, size // 2)] = False  # left padding, so little that row 1 may be computed together with it
    mask[2, size - 1 : size + 1] = False  # a hole over a chunk's end
    mask[2, -1] = False
    starts[2, [0, size // 2 + 1, size]] = True  # a whole row, inside a chunk, and at a token that is masked
    mask[3] = False
    calls = []
    for number in range(2):  # the second with the rows in another order
        x = case.inputs(length, batch=ROWS, seed=20 + number)
        calls.append(_Masked(x, mask.roll(number, 0), starts.roll(number, 0)))
    starts = starts.clone()
    starts[3, size] = True  # a row that starts anew and has no token after that
    calls[1] = _Masked(calls[1].x, calls[1].token_mask, starts.roll(1, 0))
    return calls


def _alone(
    case: BlockCase, block: SequenceBlock, call: _Masked, state: BlockState | None, row: int, more: dict[str, Any]
) -> tuple[dict[int, Tensor], BlockState | None]:
    """The naive meaning: the outputs ``[D]`` of a row's tokens by their place, and its state after the call."""
    more = {name: value[row : row + 1] for name, value in more.items()}
    now = None if state is None else {name: tensor[row : row + 1] for name, tensor in state.items()}
    outputs: dict[int, Tensor] = {}
    for continued, places in call.documents(row):
        now = now if continued else None
        if places:
            y, now = case.call(block, call.x[row : row + 1, places], now, **more)
            outputs |= zip(places, y[0].unbind(0), strict=True)
    return outputs, now


@contextmanager
def _short_calls() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a block may warn that it is not trained on so few tokens
        yield


def _switches(block: SequenceBlock) -> dict[str, Tensor]:
    """What is given row by row beside the masks, with another answer in each row."""
    found = {"updates": torch.tensor([True, True, True, False])}
    if block.scales_output:
        found["volume"] = torch.tensor([1.0, 0.5, 1.0, 0.0], dtype=block.roles.output)
    return found


@torch.no_grad()
def check_token_mask(case: BlockCase) -> None:
    """Rows with masked tokens and starts give what each row's other tokens give alone, cut at the starts.

    A masked token's output is the base model's, and its value reaches nothing: other outputs and the state are
    bit-equal whatever it is. A start resets its row and begins a chunk. From a state, and with switches row by row.
    """
    block = case.block()
    state: BlockState | None = None
    for number, call in enumerate(_masked_calls(case)):
        with _short_calls():
            switches = _switches(block) if number else {}
            after = _compare(case, block, call, state, switches, f"call {number}")
        state = after if case.causal else None


def _compare(
    case: BlockCase,
    block: SequenceBlock,
    call: _Masked,
    state: BlockState | None,
    more: dict[str, Tensor],
    what: str,
) -> BlockState:
    """``check_token_mask`` of one call from ``state`` with the switches ``more``; the state after it."""
    given: dict[str, Any] = {**call.masks, **more}
    y, after = case.call(block, call.x, state, **given)
    assert y.shape == call.x.shape, f"{what}: shape {tuple(y.shape)}, expected {tuple(call.x.shape)}"
    base = block.base_output(call.x)
    for row in range(ROWS):
        outputs, ended = _alone(case, block, call, state, row, more)
        for t in range(call.x.shape[1]):
            if t in outputs:
                assert_close(y[row, t], outputs[t], case.tolerance, f"{what}, row {row}, token {t}")
            else:
                assert_close(y[row, t], base[row, t], 0.0, f"{what}, row {row}, masked token {t}")
        if after:
            ended = block.init_state(1) if ended is None else ended
            one = {name: tensor[row : row + 1] for name, tensor in after.items()}
            assert_states_close(one, ended, case.tolerance, f"{what}, row {row}")
    unwanted, _ = case.call(block, call.x, state, want_state=False, **given)
    assert_close(unwanted, y, case.tolerance, f"{what}, without asking for the state")
    spoiled = call.x.masked_fill(~call.token_mask[..., None], torch.nan)  # [B, T, 1] over [B, T, D]
    other, ended = case.call(block, spoiled, state, **given)
    assert_equal(other[call.token_mask], y[call.token_mask], f"{what}: masked tokens are nan, outputs of others")
    for name, tensor in after.items():
        assert_equal(ended[name], tensor, f"{what}: masked tokens are nan, state {name!r}")
    return after


@torch.no_grad()
def check_token_mask_streamed(case: BlockCase) -> None:
    """Streamed with masked tokens and starts, token by token and several at a time, is as one call is.

    A step in which a row's token is masked leaves its state bit-equal, as an execution mask does, also where the token
    is not finite.
    """
    if not case.causal:
        return
    block = case.block()
    first, second = _masked_calls(case)
    state, stepped = block.allocate_state(ROWS), block.allocate_state(ROWS)
    expected: BlockState = states.clone(state)
    with _short_calls():
        for call, spoils in ((first, True), (second, False)):
            y, expected = case.call(block, call.x, expected, **call.masks)
            width = case.chunk + 1
            parts = zip(*(part.split(width, 1) for part in (call.x, call.token_mask, call.starts)), strict=True)
            streamed = [case.step(block, x, stepped, token_mask=mask, starts=starts) for x, mask, starts in parts]
            assert_close(torch.cat(streamed, 1), y, case.tolerance, f"streamed {width} tokens at a time")
            assert_states_close(stepped, expected, case.tolerance, f"streamed {width} tokens at a time")
            # [B, T, 1] over [B, T, D]
            x = call.x.masked_fill(~call.token_mask[..., None], torch.nan) if spoils else call.x
            for t in range(x.shape[1]):
                mask, starts = (part[:, t : t + 1] for part in (call.token_mask, call.starts))
                held = states.clone(state)
                given = {"token_mask": mask} if not starts.any() else {"token_mask": mask, "starts": starts}
                token = case.step(block, x[:, t : t + 1], state, **given)
                shown = mask[:, 0] if spoils else torch.ones_like(mask[:, 0])
                assert_close(token[shown], y[shown, t : t + 1], case.tolerance, f"streamed token {t}")
                rows = ~mask[:, 0] & ~starts[:, 0]
                for name, tensor in held.items():
                    assert_equal(state[name][rows], tensor[rows], f"token {t} is masked, the state {name!r} of its row")
            assert_states_close(state, expected, case.tolerance, "streamed token by token")


def check_token_mask_gradient(case: BlockCase) -> None:
    """Gradients of a call with masked tokens and starts are those of each row's tokens alone."""
    if case.dtype != torch.float64:  # that a call is cut where it should be is checked in every dtype
        return
    block = case.block()
    call = _masked_calls(case)[0]
    weight = case.inputs(call.x.shape[1], batch=ROWS, seed=30).double()
    named = dict(block.named_parameters())

    def gradients(outputs: Tensor, x: Tensor) -> dict[str, Tensor]:
        loss = (outputs.double() * weight)[call.token_mask].sum()
        found = torch.autograd.grad(loss, [x, *named.values()], allow_unused=True)
        return {name: g for name, g in zip(("x", *named), found, strict=True) if g is not None}

    with _short_calls():
        for want_state in (True, False):
            x = call.x.clone().requires_grad_()
            switches: dict[str, Any] = {**call.masks, "want_state": want_state}
            y, _ = case.call(block, x, **switches)
            given = gradients(y, x)
            x = call.x.clone().requires_grad_()
            places: dict[tuple[int, int], Tensor] = {}
            for row in range(ROWS):
                alone, _ = _alone(case, block, _Masked(x, call.token_mask, call.starts), None, row, {})
                places |= {(row, t): output for t, output in alone.items()}
            rows = [[places.get((row, t), x[row, t]) for t in range(x.shape[1])] for row in range(ROWS)]
            expected = gradients(torch.stack([torch.stack(row) for row in rows]), x)
            assert given.keys() == expected.keys(), f"gradients reach {sorted(given.keys() ^ expected.keys())} in one"
            for name, gradient in expected.items():
                assert_close(given[name], gradient, case.tolerance, f"gradient of {name!r} with masked tokens")
