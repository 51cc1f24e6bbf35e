"""The section about the Triton kernels of a streamed step: against tensor operations, in a graph, then their time.

    python scripts/gpu_checks/steps.py    # prints what a step is reckoned to take on an H100, for docs/gpu.md

Shape legend: B rows, H heads, C tokens a chunk, D head width, F hidden width, L layers of the fast network.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"variant": "ttt_linear"},
    "mlp": {"variant": "ttt_mlp"},
    "multilayer": {"variant": "ttt_multilayer", "depth": 3},
}
LIMITS = {"float32": 1e-5, "bfloat16": 4e-2}
"""Of outputs and state; a bfloat16 model rounds what a projection gives to 2^-8, and the next bit may differ."""


def _chosen(report: Report) -> dict[str, dict[str, Any]]:
    """All variants; of small shapes, which the interpreter computes, one."""
    return {"mlp": VARIANTS["mlp"]} if report.small else VARIANTS


def decode_kernels(report: Report) -> None:
    """The step by kernels: against tensor operations, captured and replayed, and its time beside theirs."""
    import torch

    from .blocks import replayed
    from .cases import block_of

    size = {"dim": 32, "heads": 2} if report.small else {"dim": 512, "heads": 4}
    for name, entry in _chosen(report).items():
        for chunk in (2,) if report.small else (16, 32):
            for dtype in ("float32",) if report.small else tuple(LIMITS):
                if report.out_of_time(f"{name} C{chunk} and what follows"):
                    return
                given = {**entry, "chunk": chunk}
                label = f"step of {name} C{chunk} D{size['dim'] // size['heads']} {dtype}"
                blocks: list[Any] = [block_of(given, report.device, getattr(torch, dtype), **size) for _ in range(2)]
                for block, backend in zip(blocks, ("torch", "triton"), strict=True):
                    block.use_backend("step", backend)
                _compare(report, label, blocks, LIMITS[dtype])
                if report.cuda:
                    replayed(report, label, blocks[1])
    _speed(report)


def _compare(report: Report, label: str, blocks: list[Any], limit: float) -> None:
    """Rows out of step, a token that is not finite, updates disabled in a row, volumes."""
    import torch

    from moshi_ttt.core.block import BlockContext

    from .cases import activations
    from .report import relative

    rows, steps = 3, 5 if report.small else 2 * blocks[0].chunk_tokens + 5
    (x,) = (each.to(report.device, blocks[0].info.dtype) for each in activations(rows, steps, blocks[0].info.dim, 1))
    x[0, 1] = math.nan
    generator = torch.Generator().manual_seed(1)
    active = (torch.rand(steps, rows, generator=generator) < 0.8).to(report.device)
    updated = (torch.rand(steps, rows, generator=generator) < 0.8).to(report.device)
    volume = torch.tensor([1.0, 0.5, 0.0], device=report.device)
    states = [block.allocate_state(rows) for block in blocks]
    worst = 0.0
    for t in range(steps):
        now = x[:, t : t + 1]
        context = BlockContext(exec_mask=active[t], updates=updated[t], volume=volume)
        expected, found = (block.step(now, state, context) for block, state in zip(blocks, states, strict=True))
        kept = active[t] & now.isfinite().all(-1)[:, 0]
        if bool(kept.any()):
            worst = max(worst, relative(found[kept], expected[kept]))
    report.check(f"{label}: output", worst, limit)
    counters = [key for key in states[0] if not states[0][key].is_floating_point()]
    same = all(torch.equal(states[1][key], states[0][key]) for key in counters)
    report.check(f"{label}: counters", 0.0 if same else 1.0, 0.0, "equal")
    fast = [key for key in states[0] if key not in counters]
    report.check(f"{label}: state", max(relative(states[1][key], states[0][key]) for key in fast), limit)


def _speed(report: Report) -> None:
    """A captured step at 7B width, by kernels and by tensor operations, beside the time that is reckoned."""
    import torch

    from moshi_ttt.core.block import BlockContext
    from moshi_ttt.core.casts import ParameterCasts

    from .blocks import graph_of
    from .cases import activations, block_of

    size = {"dim": 32, "heads": 2, "hidden": 96} if report.small else {"dim": 4096, "heads": 32, "hidden": 8}
    chunk = 2 if report.small else 32
    for name, entry in _chosen(report).items():
        block: Any = block_of({**entry, "chunk": chunk}, report.device, torch.bfloat16, **size)
        for rows in (1,) if report.small else (1, 8, 24):
            if report.out_of_time(f"speed of {name} B{rows} and what follows"):
                return
            (token,) = (each.to(report.device, torch.bfloat16) for each in activations(rows, 1, size["dim"], 1))
            taken = {}
            for backend in ("triton", "torch"):
                block.use_backend("step", backend)
                state = block.allocate_state(rows)
                mask = torch.ones(rows, dtype=torch.bool, device=report.device)
                volume = torch.ones(rows, device=report.device)
                casts = ParameterCasts(block, frozen=True)
                context = BlockContext(exec_mask=mask, updates=mask, volume=volume, casts=casts)

                def step(block: Any = block, state: Any = state, context: Any = context, token: Any = token) -> object:
                    with torch.no_grad():
                        return block.step(token, state, context)

                # As many steps as a chunk has, so that one of them ends it.
                replay = graph_of(report, step, state)
                taken[backend] = report.milliseconds(
                    lambda replay=replay: [replay() for _ in range(chunk)], 1 if report.small else 10
                )
                del state
            layers = [parameter.shape[1] for parameter in block.fast_weight] + [size["dim"] // size["heads"]]
            reckoned = sum(cost.microseconds for cost in step_costs(tuple(layers), chunk, size["heads"], rows).values())
            report.figure(
                f"step of {name} C{chunk} B{rows}",
                **{"us": 1e3 * taken["triton"] / chunk, "torch us": 1e3 * taken["torch"] / chunk,
                   "reckoned us": reckoned, "times faster": taken["torch"] / taken["triton"]},
            )  # fmt: skip
            report.free()


# ---- what a step is reckoned to take

BYTES_A_SECOND, FLOPS, TENSOR_FLOPS, LEAST_US = 3.35e12, 45e12, 700e12, 2.5
"""Of an H100 (SXM): those of its memory, in float32 and in bfloat16 products, and the least time of a kernel."""


RECKONED = {"TTT-Linear": (128, 128), "TTT-MLP": (128, 512, 128), "three layers": (128, 512, 512, 128)}
"""Widths of the fast networks of the table."""


@dataclass(frozen=True)
class Cost:
    """Bytes from and to memory, and operations, of one launch (or of several alike: ``launches``)."""

    bytes: float
    operations: float
    launches: int = 1
    flops: float = FLOPS

    @property
    def microseconds(self) -> float:
        return max(LEAST_US * self.launches, 1e6 * self.bytes / BYTES_A_SECOND, 1e6 * self.operations / self.flops)


def step_costs(widths: tuple[int, ...], chunk: int, heads: int, rows: int) -> Mapping[str, Cost]:
    """The launches of a step of a bfloat16 model with frozen parameters, at the mean over a chunk's positions.

    Each launch reads from memory what it needs once; what passes between launches (some kilobytes a head) is left out.
    """
    from moshi_ttt.plugins.hybrid.triton.step_blocks import slices_of

    width, channels, seen = widths[0], heads * widths[0], (chunk + 1) / 2
    pairs, programs = list(pairwise(widths)), heads * rows
    found = {
        "four projections": Cost(4 * 2 * channels**2, 4 * 2 * rows * channels**2, 4, TENSOR_FLOPS),
        "prepare": Cost(4 * heads * channels + rows * 2 * 4 * channels, 2 * rows * heads * channels),
    }
    first = pairs[:2]
    both = [2, 1]  # layer 0 takes the key and the query
    found["keys"] = Cost(
        programs * 4 * (sum(a * b for a, b in first) + seen * width),
        programs * 2 * (sum(n * a * b for n, (a, b) in zip(both, first, strict=False)) + seen * width),
    )
    for i, (a, b) in list(enumerate(pairs))[2:]:
        found[f"more_keys {i}"] = Cost(programs * 4 * a * b, programs * 2 * a * b)
    for i, (a, b) in reversed(list(enumerate(pairs))[2:]):
        found[f"gradients {i}"] = Cost(programs * 4 * a * b, programs * 2 * a * b)
    border = 1 / chunk  # of the steps end a chunk: their weights are read and written, their slots cleared
    if len(pairs) == 1:
        update = border * (2 * width * width + chunk * width * (1 + slices_of(width)[1]))
        found["queries"] = Cost(
            programs * 4 * (seen * width + update), programs * 2 * (seen + border * chunk * width) * width
        )
    for i, ((a, b), (_, c)) in enumerate(pairwise(pairs)):
        slots = 2 * seen * b
        changed = b * c + (a * b if i == 0 else 0)
        times = 2 if i == 0 else 1  # W of the next layer for the gradient, then for the query; the second is in a cache
        found[f"queries {i}" if len(pairs) > 2 else "queries"] = Cost(
            programs * 4 * (b * c + slots + border * (2 * changed + chunk * (2 * b + c))),
            programs * 2 * (times * b * c + slots + border * chunk * changed),
        )
    found["outputs"] = Cost(programs * 4 * (seen + border * 3 * chunk) * width, programs * 2 * seen * width)
    found["norm, gate"] = Cost(rows * channels * (4 + 2 + 3 * 2) + 3 * 4 * channels, 20 * rows * channels, 2)
    return found


def table() -> str:
    """What a step is reckoned to take at chunk 32 with 32 heads of 128, as docs/gpu.md has it."""
    counts = (1, 8, 24)
    headings = ["launches", "kernels", "MB, 1 row", "MFLOP, 1 row", *(f"us, {n} row{'s' * (n > 1)}" for n in counts)]
    lines = [f"| {' | '.join(headings)} |", f"| --- |{' ---: |' * (len(headings) - 1)}"]
    for name, widths in RECKONED.items():
        costs = [step_costs(widths, 32, 32, count) for count in counts]
        inner = [key for key in costs[0] if key != "four projections"]
        for launch in costs[0] if name == "TTT-MLP" else inner:
            one = costs[0][launch]
            times = " | ".join(f"{cost[launch].microseconds:.1f}" for cost in costs)
            lines.append(
                f"| {name}: {launch} | {one.launches} | {one.bytes / 1e6:.1f} | {one.operations / 1e6:.1f} | {times} |"
            )
        summed = [sum(cost[key].microseconds for key in inner) for cost in costs]
        own = [costs[0][key] for key in inner]
        lines.append(
            f"| **{name}, without projections** | {sum(cost.launches for cost in own)} | "
            f"{sum(cost.bytes for cost in own) / 1e6:.1f} | {sum(cost.operations for cost in own) / 1e6:.1f} | "
            f"{' | '.join(f'{total:.0f}' for total in summed)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gpu_checks.source_tree import make_importable

    make_importable()
    print(table(), end="")


if __name__ == "__main__":
    main()
