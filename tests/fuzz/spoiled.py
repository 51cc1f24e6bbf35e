"""One token that is not finite: other rows and earlier tokens do not notice, its chunk's update is left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.state import BlockState
from tests.fuzz.cases import Spoiled
from tests.fuzz.comparison import check, error
from tests.fuzz.schedules import BOUNDS, Rows, Tokens


def check_spoiled(case: Spoiled) -> None:
    """Raises AssertionError with all that the token reaches and should not."""
    dtype = {"float64": torch.float64, "float32": torch.float32}[case.dtype]
    block = case.layer.block(dtype)
    x, embeddings = Tokens(case.batch, case.layer.width, dtype, case.seed).next(case.length)
    spoiled = [tensor.clone() for tensor in (x, embeddings)]
    for tensor in spoiled:
        tensor[case.row, case.token] = float(case.value)
    sane, _ = _heard(block, x, embeddings, case.steps)
    y, state = _heard(block, *spoiled, case.steps)

    chunk, row = case.layer.option["chunk"], case.row
    begins = case.token - case.token % chunk
    others = [other for other in range(case.batch) if other != row]
    problems = [] if torch.equal(y[others], sane[others]) else ["other rows are not bit-equal"]
    if not case.layer.option.get("bidirectional"):
        before = case.token if case.layer.causal else begins
        problems += [] if torch.equal(y[row, :before], sane[row, :before]) else ["earlier outputs are not bit-equal"]
        problems += [] if y[row, begins + chunk :].isfinite().all() else ["not finite after the chunk"]
    if case.layer.causal and not math.isfinite(float(case.value)):
        problems += _memory_problems(case, block, state, y, (x, embeddings))
    check(problems)


@torch.no_grad()
def _heard(block: SequenceBlock, x: Tensor, embeddings: Tensor, steps: bool) -> tuple[Tensor, BlockState]:
    if not steps:
        y, state = block(x, None, BlockContext(input_embeddings=embeddings))
        return y, state
    state = block.allocate_state(len(x))
    tokens = zip(x.split(1, 1), embeddings.split(1, 1), strict=True)
    outputs = [block.step(token, state, BlockContext(input_embeddings=embedding)) for token, embedding in tokens]
    return torch.cat(outputs, dim=1), state


def _memory_problems(
    case: Spoiled, block: SequenceBlock, state: BlockState, y: Tensor, sane: tuple[Tensor, Tensor]
) -> list[str]:
    """After its chunk the row goes on as if that chunk's updates had been off; one skipped update where it ended.

    Of ttt_ridge the token's own updates alone, and it is counted at once.
    """
    chunk, row, dtype = case.layer.option["chunk"], case.row, y.dtype
    begins = case.token - case.token % chunk
    ends = begins + chunk
    rows = Rows(case.layer, case.batch, dtype)
    if case.layer.ridge:
        begins, ends = case.token, case.token + 1
    parts = [(0, begins, True), (begins, min(ends, case.length), False), (ends, case.length, True)]
    problems = []
    for start, end, learns in parts:
        if start >= end:
            continue
        heard = (tensor[row, start:end] for tensor in sane)
        expected = rows.hear(row, *heard, learns, spoiled=None if learns else case.token - start)
        # The success gate weighs four scores: that of the bad token and that of its answer, by the next, are zero.
        gated = case.layer.in_place and case.layer.option["success_gate"] and start >= ends
        judged = max(start, case.token + 5) if gated else start
        if judged >= end or not learns:
            continue
        if not (wrong := error(y[row, judged:end], expected[judged - start :])) <= BOUNDS[case.dtype]:
            problems.append(f"tokens {start} to {end - 1}: error {wrong:.3g}")
    counts = block.skipped_updates(state).tolist()
    wanted = [int(other == row and ends <= case.length) for other in range(case.batch)]
    return problems + ([] if counts == wanted else [f"skipped updates {counts}, expected {wanted}"])
