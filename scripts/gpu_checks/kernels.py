"""The section about the Triton kernels of training: blocks with ``backend: triton`` against float64 and torch's form.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock

from .cases import activations, block_of
from .report import Report, relative

LIMIT = 1e-5
"""Of the output in float32, over the norm of what float64 gives."""
GRADIENT_LIMIT = 1e-4
"""Of gradients: those of a whole block, whose products outside the inner loop are torch's."""


def training_kernels(report: Report) -> None:
    """TTT-Linear and TTT-MLP with ``backend: triton``: against float64 on the CPU, then beside ``backend: torch``."""
    width, heads = (16, 2) if report.small else (128, 32)
    for variant in ("ttt_linear", "ttt_mlp"):
        for chunk in (16,) if report.small else (16, 32):
            entry: dict[str, Any] = {"variant": variant, "chunk": chunk}
            label = f"{variant} C{chunk} D{width}"
            if report.out_of_time(f"{label} and what follows"):
                return
            try:
                _compare(report, label, entry, width)
                _compare_bfloat16(report, label, entry, width)
                for rows in (1,) if report.small else (1, 4):
                    _time(report, f"{label} B{rows}", entry, rows, {"dim": heads * width, "heads": heads})
            except Exception as problem:  # a kernel that does not fit this card: the others go on
                traceback.print_exc()
                report.check(f"{label}: {type(problem).__name__}", 1.0, 0.0, str(problem)[:200])
            report.free()


def _by(entry: dict[str, Any], backend: str) -> dict[str, Any]:
    return {**entry, "backend": {"train": backend}}


def _compare(report: Report, label: str, entry: dict[str, Any], width: int) -> None:
    """A call, and two calls, the second from inside a chunk: the state between them cut from the graph, and not."""
    shape = {"dim": 2 * width, "heads": 2}
    reference = block_of(_by(entry, "torch"), torch.device("cpu"), torch.float64, **shape)
    block = block_of(_by(entry, "triton"), report.device, torch.float32, **shape)
    chunk: int = entry["chunk"]
    calls: dict[str, tuple[list[int], dict[str, bool]]] = {
        "": ([4 * chunk + 7], {"want_state": False}),
        ", carried": ([chunk + 5, 3 * chunk + 2], {"detach_state": True}),
        ", continued": ([chunk + 5, 3 * chunk + 2], {}),
    }
    for name, (cuts, given) in calls.items():
        expected, found = (_outcome(each, cuts, BlockContext(**given)) for each in (reference, block))
        report.check(f"{label}{name}: output", relative(found[0], expected[0]), LIMIT)
        pairs = [(a, b) for a, b in zip(found[1:], expected[1:], strict=True) if float(b.norm()) > 1e-9]
        report.check(f"{label}{name}: gradients", max(relative(a, b) for a, b in pairs), GRADIENT_LIMIT)


def _compare_bfloat16(report: Report, label: str, entry: dict[str, Any], width: int) -> None:
    """A call under the policy ``uniform``: no further from float64 than torch's form, by more than one rounding."""
    shape: dict[str, Any] = {"dim": 2 * width, "heads": 2, "policy": "uniform"}
    blocks = [block_of(_by(entry, "torch"), torch.device("cpu"), torch.float64, **shape)]
    blocks += [block_of(_by(entry, each), report.device, torch.bfloat16, **shape) for each in ("torch", "triton")]
    values = blocks[1].state_dict()  # which bfloat16 holds
    for block in blocks:
        block.load_state_dict(values)
    cuts = [4 * entry["chunk"] + 7]
    expected, theirs, ours = (_outcome(each, cuts, BlockContext(want_state=False), torch.bfloat16) for each in blocks)
    report.check(f"{label}, uniform: output", relative(ours[0], expected[0]), relative(theirs[0], expected[0]) + 2**-8)
    kept = [n for n, tensor in enumerate(expected) if n and float(tensor.norm()) > 1e-9]
    total, most = (sum(relative(each[n], expected[n]) for n in kept) for each in (ours, theirs))
    report.check(f"{label}, uniform: gradients, in sum", total, most)


def _outcome(
    block: SequenceBlock, cuts: list[int], context: BlockContext, through: torch.dtype | None = None
) -> list[Tensor]:
    """The output, the gradient of the input, and those of the parameters (zero where there is none).

    ``through``: a dtype that the inputs are rounded to.
    """
    device, dtype = block.info.device, block.info.dtype
    drawn = activations(2, sum(cuts), block.info.dim, 2)
    x, cotangent = (each.to(through or dtype).to(device, dtype, copy=True) for each in drawn)
    x.requires_grad_()
    block.zero_grad()
    state, outputs = None, []
    for part in x.split(cuts, 1):
        y, state = block(part, state, context)
        outputs.append(y)
    output = torch.cat(outputs, 1)
    (output * cotangent).sum().backward()
    assert x.grad is not None
    return [output, x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters())]


def _time(report: Report, label: str, entry: dict[str, Any], rows: int, shape: dict[str, int]) -> None:
    """Forward and backward of one block in a bfloat16 model with a float32 state, by both backends.

    Of the kernels also with the tile that is found by measuring, which on a CPU is none.
    """
    length = 40 if report.small else 1250
    dtype = torch.float32 if report.small else torch.bfloat16
    x = torch.randn(rows, length, shape["dim"], device=report.device, dtype=dtype, requires_grad=True)
    spent = {}
    backends: dict[str, dict[str, Any]] = {"triton": {"train": "triton"}, "torch": {"train": "torch"}}
    if report.device.type == "cuda":
        backends["tuned"] = {"train": "triton", "tune": True}
    for name, backend in backends.items():
        block = block_of({**entry, "backend": backend}, report.device, dtype, **shape)
        spent[name] = report.milliseconds(_both(block, x), 3 if name == "torch" else 5)
    ours, theirs = spent["triton"], spent["torch"]
    found = {"ms": ours, "torch ms": theirs, "times faster": theirs / ours}
    report.figure(f"kernels {label}", **found, **({"tuned ms": spent["tuned"]} if "tuned" in spent else {}))


def _both(block: SequenceBlock, x: Tensor) -> Callable[[], None]:
    def both() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = block(x, None, BlockContext(want_state=False))
        y.backward(torch.ones_like(y))

    return both
