"""The section about the Triton kernels of training: against float64, then beside torch's form of the same.

Shape legend: B rows, H heads, T tokens, C tokens a chunk, D head width, F hidden width.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, initial_state
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.triton.linear_chunk import linear_chunks
from moshi_ttt.plugins.hybrid.triton.mlp_chunk import mlp_chunks
from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings

from .report import Report, relative

LIMIT = 1e-5
"""Of every result and gradient in float32, over the norm of what float64 gives."""
Call = Callable[[], tuple[Tensor, ...]]


class Problem:
    """A call of the inner loop: random tokens, fast weights and what is learned beside, on a device in a dtype."""

    def __init__(self, widths: tuple[int, ...], rows: int, heads: int, length: int, chunk: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        width = widths[0]
        q, k = (torch.nn.functional.normalize(random(rows, length, heads, width), dim=-1) for _ in range(2))
        self.tokens = [q, k, random(rows, length, heads, width), random(rows, length, heads).abs() / width]
        self.weights = [random(heads, a, b, scale=0.1) for a, b in pairwise(widths)]
        self.biases = [random(heads, 1, b, scale=0.1) for b in widths[1:]]
        self.norm = [1 + random(heads, width, scale=0.1), random(heads, width, scale=0.1)]
        self.token_scale = 1 / torch.arange(1, chunk + 1, dtype=torch.float64)
        self.cotangent = random(rows, length, heads, width)
        self.rows, self.length, self.chunk = rows, length, chunk

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Tokens, weights, biases, norm and token scale: what a gradient is taken of."""
        parts = [*self.tokens, *self.weights, *self.biases, *self.norm, self.token_scale]
        return [part.to(device, dtype).requires_grad_() for part in parts]

    def both(self, leaves: list[Tensor], output: Callable[..., Tensor]) -> Call:
        """Forward and backward: the output ``[B, T, H, D]``, and the gradients of ``leaves``."""
        cotangent = self.cotangent.to(leaves[0])
        layers = len(self.weights)
        cuts = (4, 4 + layers, 4 + 2 * layers, 6 + 2 * layers)
        groups = [leaves[a:b] for a, b in pairwise((0, *cuts))]

        def call() -> tuple[Tensor, ...]:
            y = output(*groups, leaves[-1])
            return (y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves))

        return call

    def by_torch(self, tokens: list[Tensor], weights: Any, biases: Any, norm: list[Tensor], scale: Tensor) -> Tensor:
        state = initial_state(tuple(weights), tuple(biases), self.chunk, self.rows)
        layout = ChunkLayout(self.length, self.chunk, device=scale.device)
        y, _ = chunk_inner_loop(Tokens(*tokens), state, InnerNorm(*norm, 1e-6), scale, layout=layout)
        return y.view_as(tokens[0])  # [B, T, H D] -> [B, T, H, D]

    def by_kernels(self, settings: TrainSettings) -> Callable[..., Tensor]:
        ends = torch.arange(-(-self.length // self.chunk)) < self.length // self.chunk  # [N]

        def output(tokens: list[Tensor], weights: Any, biases: Any, norm: list[Tensor], scale: Tensor) -> Tensor:
            updates = torch.where(ends.to(scale.device), scale[-1], 0).repeat(self.rows, 1)  # [N] -> [B, N]
            # [H, a, b] -> [B, H, a, b]
            starts = [[part.expand(self.rows, -1, -1, -1) for part in parts] for parts in (weights, biases)]
            if len(weights) == 1:
                return linear_chunks(*tokens, starts[0][0], starts[1][0], *norm, scale, updates, settings)[0]
            return mlp_chunks(*tokens, tuple(starts[0]), tuple(starts[1]), *norm, scale, updates, settings)[0]

        return output


def training_kernels(report: Report) -> None:
    """TTT-Linear and TTT-MLP by Triton kernels: against float64 on the CPU, then beside torch's form."""
    width, heads = (16, 2) if report.small else (128, 32)
    precision = "ieee" if report.small else "tf32x3"
    for kind, widths in (("linear", (width, width)), ("mlp", (width, 4 * width, width))):
        for chunk in (16,) if report.small else (16, 32):
            settings = TrainSettings(chunk=chunk, eps=1e-6, precision=precision, slice_width=16 if report.small else 32)
            label = f"{kind} C{chunk} D{width} {precision}"
            if report.out_of_time(f"{label} and what follows"):
                return
            try:
                _compare(report, label, Problem(widths, 2, 2, 3 * chunk + 5, chunk), settings)
                for rows in (1,) if report.small else (1, 4):
                    length = 40 if report.small else 1250
                    _time(report, f"{label} B{rows}", Problem(widths, rows, heads, length, chunk), settings)
            except Exception as problem:  # a kernel that does not fit this card: the others go on
                traceback.print_exc()
                report.check(f"{label}: {type(problem).__name__}", 1.0, 0.0, str(problem)[:200])
            report.free()


def _compare(report: Report, label: str, problem: Problem, settings: TrainSettings) -> None:
    reference = problem.both(problem.leaves(torch.device("cpu"), torch.float64), problem.by_torch)()
    found = problem.both(problem.leaves(report.device, torch.float32), problem.by_kernels(settings))()
    report.check(f"{label}: output", relative(found[0], reference[0]), LIMIT)
    worst = max(relative(a, b) for a, b in zip(found[1:], reference[1:], strict=True))
    report.check(f"{label}: gradients", worst, LIMIT)


def _time(report: Report, label: str, problem: Problem, settings: TrainSettings) -> None:
    leaves = problem.leaves(report.device, torch.float32)
    kernels = report.milliseconds(problem.both(leaves, problem.by_kernels(settings)), 5)
    theirs = report.milliseconds(problem.both(leaves, problem.by_torch), 3)
    report.figure(f"kernels {label}", **{"ms": kernels, "torch ms": theirs, "times faster": theirs / kernels})
