"""The cost of a block on an accelerator, and a check that it never waits for one: counted without values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.device_log import DeviceLog
from moshi_ttt.core.testing.case import BlockCase


@dataclass(frozen=True)
class DeviceCost:
    """The cost of a block on an accelerator.

    Attributes:
        forward, backward, step: launches of a training call, of its backward pass, and of a streamed token.
        kept_bytes: alive after a training call that were not before: its output, and what the backward pass needs.
        peak_bytes: the most that is alive in the call and its backward pass, gradients of parameters among them.
    """

    forward: int
    backward: int
    step: int
    kept_bytes: int
    peak_bytes: int


def device_cost(block: SequenceBlock, *, batch: int, tokens: int, carried: bool = False) -> DeviceCost:
    """The cost of a block that is on the meta device, for ``batch`` streams of so many tokens.

    ``carried``: the call continues a state, and gives the state after it, which is cut from the graph.
    """
    x = torch.empty(batch, tokens, block.info.dim, dtype=block.roles.param, device="meta", requires_grad=True)
    context = BlockContext(input_embeddings=x.detach(), want_state=carried, detach_state=carried)
    state = block.allocate_state(batch) if carried else None
    with DeviceLog() as log:
        y, after = block(x, state, context)
        after = {name: tensor.detach() for name, tensor in after.items()}
        forward, kept = log.num_launches, log.bytes
        y.sum().backward()
        backward = log.num_launches - forward
    step = 0
    if block.causal:
        buffers, token = block.allocate_state(batch), x.detach()[:, :1]
        with torch.no_grad(), DeviceLog() as streamed:
            block.step(token, buffers, BlockContext(input_embeddings=token))
        step = streamed.num_launches
    return DeviceCost(forward, backward, step, kept, log.peak)


def check_device(case: BlockCase, *, as_is: bool = False) -> None:
    """Nothing waits for an accelerator, and no tensor lies on the CPU: in calls, backward passes, steps, resets.

    Tensors without a dimension may lie on the CPU: they are arguments of a launch.

    Args:
        as_is: with the options that were chosen for this machine, which then have to serve tensors without values.
    """
    case = case if as_is else case.anywhere()
    block, rows = case.block(device="meta"), case.shape.batch
    x = torch.empty(rows, 2 * case.chunk + 1, case.shape.dim, dtype=case.dtype, device="meta", requires_grad=True)
    short = x.detach()[:, : case.chunk + 1]  # [B, chunk + 1, D]: a chunk that ends, and one that goes on from it
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    volume = torch.empty(rows, dtype=block.roles.output, device="meta") if block.scales_output else 1.0
    runs: dict[str, Callable[[], object]] = {
        "a training call and its backward pass": lambda: case.call(block, x, want_state=False)[0].sum().backward(),
        "a call that gives its state, row by row": lambda: (
            case.call(block, x[:, : case.chunk + 1], updates=mask, volume=volume)[0].sum().backward()
        ),
        "a call that cuts its state from the graph": lambda: (
            case.call(block, x, updates=mask, volume=volume, detach_state=True)[0].sum().backward()
        ),
        "statistics": lambda: block.statistics(short, case.context(short)),
        "inner losses": lambda: block.inner_losses(short, case.context(short)),
    }
    if case.causal:
        buffers = block.allocate_state(rows)
        token = short[:, :1]
        runs |= {
            "a call that continues a state": lambda: case.call(block, short, buffers, reset=mask, exec_mask=mask),
            "a call that carries a state": lambda: (
                case.call(block, x, buffers, reset=mask, detach_state=True)[0].sum().backward()
            ),
            "a step": lambda: case.step(block, token, buffers),
            "a step with masks": lambda: case.step(block, token, buffers, exec_mask=mask, updates=mask, volume=volume),
            "a step of a token that is masked or a start": lambda: case.step(
                block,
                token,
                buffers,
                token_mask=mask[:, None],
                starts=mask[:, None],  # [B] -> [B, 1]
            ),
            "a step with a reset": lambda: case.step(block, token, buffers, reset=mask),
            "several tokens streamed": lambda: case.step(block, short, buffers),
            "a reset": lambda: block.reset_state(buffers, mask),
            "forgetting": lambda: block.forget(buffers),
            "recent losses": lambda: block.recent_losses(short, buffers, case.context(short)),
            "skipped updates": lambda: block.skipped_updates(buffers),
        }
    for name, run in runs.items():
        with DeviceLog() as log:
            try:
                run()
            except (RuntimeError, NotImplementedError) as error:  # what reads a value of a meta tensor
                raise AssertionError(f"{name}: a value is read: {error}") from error
        assert not log.problems, f"{name}: {' '.join(dict.fromkeys(log.problems))}"
