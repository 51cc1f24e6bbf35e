"""Sections about one block at a time: against float64, and its step in a captured graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.block import BlockContext, SequenceBlock
from moshi_ttt.core.state import BlockState

from .cases import CHUNK, VARIANTS, activations, block_of
from .report import Report, error, relative

LENGTH = 3 * CHUNK + 5
LIMITS = {torch.float32: (2e-5, 1e-3), torch.bfloat16: (4e-2, 1e-1)}
"""Of outputs and of gradients; a bfloat16 model rounds the inputs of each product to 2^-8."""


def against_float64(report: Report) -> None:
    """Every variant, forward and backward, in one call and in three, against float64 on the CPU."""
    for name, entry in VARIANTS.items():
        if report.out_of_time(f"{name} and what follows"):
            return
        reference = block_of(entry, torch.device("cpu"), torch.float64)
        for dtype, (limit, gradient_limit) in LIMITS.items():
            block = block_of(entry, report.device, dtype)
            for cuts in ([LENGTH], [CHUNK - 1, CHUNK + 5, LENGTH - 2 * CHUNK - 4]):
                expected, actual = _outcome(reference, cuts), _outcome(block, cuts)
                label = f"{name} {str(dtype)[6:]}, {len(cuts)} call(s)"
                report.check(f"{label}: output", error(actual[0], expected[0]), limit)
                pairs = [(a, b) for a, b in zip(actual[1:], expected[1:], strict=True) if float(b.norm()) > 1e-9]
                report.check(f"{label}: gradients", max(relative(a, b) for a, b in pairs), gradient_limit)


def _outcome(block: SequenceBlock, cuts: list[int]) -> list[Tensor]:
    """The output, the gradient of the input, and those of the parameters (zero where there is none)."""
    device, dtype = block.info.device, block.info.dtype
    x, embeddings, cotangent = (each.to(device, dtype) for each in activations(3, LENGTH, block.info.dim, 3))
    x.requires_grad_()
    block.zero_grad()
    state: BlockState | None = None
    outputs = []
    for part, embedded in zip(x.split(cuts, 1), embeddings.split(cuts, 1), strict=True):
        y, state = block(part, state, BlockContext(input_embeddings=embedded, want_state=len(cuts) > 1))
        outputs.append(y)
    output = torch.cat(outputs, 1)
    (output * cotangent).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters()]
    assert x.grad is not None
    return [output, x.grad, *gradients]


def captured_step(report: Report) -> None:
    """The step captured in a CUDA graph and replayed, against the step, bit for bit: masks, a reset, a restore."""
    for name, entry in VARIANTS.items():
        if report.out_of_time(f"{name} and what follows"):
            return
        for dtype in LIMITS:
            replayed(report, f"{name} {str(dtype)[6:]}", block_of(entry, report.device, dtype))


def replayed(report: Report, label: str, block: SequenceBlock) -> None:
    batch, device, dtype = 4, report.device, block.info.dtype
    x, embeddings = (each.to(device, dtype) for each in activations(batch, LENGTH, block.info.dim, 2))
    active = (torch.rand(LENGTH, batch, generator=torch.Generator().manual_seed(3)) > 0.2).to(device)
    token, embedded = x[:, :1].clone(), embeddings[:, :1].clone()  # [B, 1, D]: what the graph reads
    mask, updates = (torch.ones(batch, dtype=torch.bool, device=device) for _ in range(2))
    mine, eager = block.allocate_state(batch), block.allocate_state(batch)
    start = states.clone(mine)
    out = torch.full_like(token, torch.nan)
    volume = torch.ones(batch, dtype=block.roles.output, device=device)
    context = BlockContext(input_embeddings=embedded, exec_mask=mask, updates=updates, volume=volume)
    replay = graph_of(report, lambda: out.copy_(block.step(token, mine, context)), mine)
    worst = torch.zeros((), device=device)
    for t in range(LENGTH):
        token.copy_(x[:, t : t + 1])
        embedded.copy_(embeddings[:, t : t + 1])
        mask.copy_(active[t])
        updates.fill_(t != CHUNK + 1)  # one step with test-time updates disabled
        volume[t % batch] = (0.0, 1.0, 0.5)[t % 3]  # each step another row's
        out.fill_(torch.nan)
        replay()
        own = BlockContext(
            input_embeddings=embedded.clone(), exec_mask=mask.clone(), updates=updates.clone(), volume=volume.clone()
        )  # fmt: skip
        expected = block.step(token.clone(), eager, own)
        rows = active[t][:, None, None]
        worst = torch.maximum(worst, torch.where(rows, (out - expected).abs(), 0).float().max())
        if t == CHUNK + 3:  # one caller hangs up; then all streams are saved and restored into the same buffers
            gone = torch.tensor([True] + [False] * (batch - 1), device=device)
            block.reset_state(mine, gone)
            block.reset_state(eager, gone)
            saved = states.clone(mine)
            states.copy_(mine, start)
            states.copy_(mine, saved)
    report.check(f"{label}: replay against the step", float(worst.detach()), 0.0, "bit for bit")
    report.check(f"{label}: state after it", max(error(mine[key], eager[key]) for key in mine), 0.0, "bit for bit")
    fast = [key for key in mine if mine[key].is_floating_point() and not torch.equal(mine[key], start[key])]
    report.check(f"{label}: state that never moved", 0.0 if fast else 1.0, 0.0)


def graph_of(report: Report, call: Callable[[], object], state: BlockState) -> Callable[[], object]:
    """``call`` as a captured graph, ``state`` as it was before; without CUDA, the call itself."""
    if not report.cuda:
        return call
    before = states.clone(state)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # kernels are loaded and workspaces allocated before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    states.copy_(state, before)
    return graph.replay
