"""A streamed step by Triton kernels: buffers, block sizes, the order of launches. All tensors are contiguous.

Nothing here runs a kernel of torch's: buffers are allocated, and what lies in them is written by the kernels. So a step
makes as many launches as there are in this file, and a captured graph as many nodes.

Shape legend: B rows, H heads, C tokens a chunk, D head width, F hidden width, P slices, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.triton import step_kernels as kernels
from moshi_ttt.plugins.hybrid.triton import step_surroundings as around
from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of, loop_block, slices_of

LAUNCH = {"num_warps": 4, "num_stages": 1}
WIDE = 4096
"""Channels that a program takes at a time where it needs all of a row."""
GATED = 1024
"""Channels of the output that one program has."""


@dataclass(frozen=True, kw_only=True)
class InnerState:
    """The parts of a state, each of which a step writes to: counters ``[B]`` and, for each layer, four tensors."""

    position: Tensor
    spoiled: Tensor
    skipped: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    inputs: Sequence[Tensor]
    gradients: Sequence[Tensor]


def prepare(
    x: Tensor, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, updated: Tensor | None, active: Tensor | None,
    position: Tensor, spoiled: Tensor, lr_weight: Tensor, lr_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    offset: Tensor, base_rate: float, factor: float, theta: float, eps: float, limit: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What enters the inner loop: q, k, v ``[B, 1, H, D]``, lr ``[B, 1, H]``, ok ``[B, H]``, now ``[B, 2]``, scale.

    Args:
        x: ``[B, 1, H D]``.
        q, k, v: its projections, ``[B, 1, H D]``.
        given: ``[B]`` bool, rows whose token may enter as far as ``x`` does not say.
        updated, active: ``[B]`` bool.
        lr_weight, lr_bias: ``[H, 1, H D]`` and ``[H, 1]``.
        norm_weight, norm_bias: ``[H, D]``.
        offset: ``[C]``, the learned part of the token scale.
        limit: what all numbers have to be below.
    """
    made = prepared_like(x, norm_weight, offset)
    (batch, _, channels), (heads, width) = x.shape, norm_weight.shape
    around.prepare[(batch * heads,)](
        x, q, k, v, given, updated, active, position, spoiled, lr_weight, lr_bias, norm_weight, norm_bias, offset,
        *made, base_rate, factor, math.log2(theta), eps, limit, H=heads, D=width, BP=block_of(width // 2), N=channels,
        BN=min(WIDE, block_of(channels)), C=offset.shape[0], BC=block_of(offset.shape[0]), **LAUNCH,
    )  # fmt: skip
    return made


def prepared_like(x: Tensor, norm_weight: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Memory for what ``prepare`` gives."""
    batch, (heads, width) = x.shape[0], norm_weight.shape
    tokens = [norm_weight.new_empty(batch, 1, heads, width, dtype=torch.float32) for _ in range(3)]
    ok, now = (x.new_empty(batch, size, dtype=torch.int32) for size in (heads, 2))
    return (*tokens, tokens[0].new_empty(batch, 1, heads), ok, now, tokens[0].new_empty(offset.shape))


def look(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, active: Tensor | None, position: Tensor, spoiled: Tensor, chunk: int,
    limit: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ok [B, H]`` and ``now [B, 2]`` of tokens that are given, as ``prepare`` gives them of its own."""
    batch, _, heads, width = q.shape
    ok, now = (q.new_empty(batch, size, dtype=torch.int32) for size in (heads, 2))
    around.look[(batch * heads,)](
        q, k, v, lr, active, position, spoiled, ok, now, limit, H=heads, D=width, BD=block_of(width), C=chunk, **LAUNCH
    )
    return ok, now


def norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The LayerNorm of ``y [B, 1, N]`` over N, in ``dtype``."""
    made = torch.empty_like(y, dtype=dtype)
    width = y.shape[2]
    warps = 8 if width >= 2048 else 4
    around.norm[(y.shape[0],)](y, weight, bias, made, eps, N=width, BN=block_of(width), num_warps=warps, num_stages=1)
    return made


def gate(x: Tensor, added: Tensor, alpha: Tensor, volumes: Tensor | None, volume: float) -> Tensor:
    """``x + volume * tanh(alpha) * added`` of ``x [B, 1, N]``; ``volumes [B]`` or the number ``volume``."""
    batch, _, width = x.shape
    made = x.new_empty(x.shape)
    block = min(GATED, block_of(width))
    around.gate[(batch, -(-width // block))](
        x, added, alpha, volumes, volume, made, N=width, BN=block, ONE=alpha.numel() == 1, **LAUNCH
    )
    return made


class InnerStep:
    """The launches of one step of the inner loop: their tensors, and room for what passes between them."""

    def __init__(
        self, tokens: Sequence[Tensor], ok: Tensor, now: Tensor, scale: Tensor, state: InnerState,
        norm: Sequence[Tensor], active: Tensor | None, updated: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.lr = tokens
        self.state, self.norm, self.scale, self.eps = state, tuple(norm), scale, eps
        self.active, self.updated = active, updated
        self.rows = (ok, now, active)
        batch, _, heads, self.width = self.q.shape
        self.programs, self.chunk = batch * heads, scale.shape[0]
        self.outs = [weight.shape[3] for weight in state.weights]
        self.layers = len(self.outs)
        self.slices = [slices_of(out) for out in self.outs]  # of each layer's output: units of one, and how many
        self.common = {"H": heads, "HEADS": block_of(heads), "C": self.chunk}
        self.slots = {**self.common, "BC": loop_block(self.chunk)}
        self.depth = {"D": self.width, "BD": block_of(self.width)}

    def room(self, *shape: int) -> Tensor:
        return self.q.new_empty(self.programs, *shape, dtype=torch.float32)

    def slice_of(self, layer: int) -> dict[str, int]:
        units, count = self.slices[layer]
        return {"F": self.outs[layer], "S": units, "SLICES": count}

    def following(self, layer: int) -> dict[str, int]:
        """Of the next layer: its width, and how much of it is taken at a time; all of it where it is the last one."""
        out = self.outs[layer + 1]
        return {"OUT": out, "BO": block_of(out) if layer + 2 == self.layers else loop_block(out, 128)}

    def grid(self, layer: int) -> tuple[int, int]:
        return self.programs, self.slices[layer][1]

    def before(self, layer: int) -> dict[str, int]:
        """Of the slices that a layer's output is summed over."""
        count = self.slices[layer - 1][1]
        return {"BEFORE": count, "BQ": block_of(count)}

    def run(self) -> Tensor:
        """``y [B, 1, H D]``; the state is changed in place."""
        self.key_pass()
        for layer in range(self.layers - 2, 0, -1):
            self.gradient(layer)
        y = self.q.new_empty(self.q.shape[0], 1, self.common["H"] * self.width, dtype=torch.float32)
        query, affinities, before = self.query_pass()
        state, last = self.state, self.layers - 1
        kernels.outputs[(self.programs,)](
            self.q, *self.rows, self.updated, state.position, state.spoiled, state.skipped, state.biases[last],
            state.inputs[0], state.gradients[last], self.scale, query, affinities, *self.norm, y, self.eps,
            **self.slots, **self.depth, **before, LAYERS=self.layers, **LAUNCH,
        )  # fmt: skip
        return y

    def key_pass(self) -> None:
        state, several = self.state, self.layers > 1
        self.z = [self.room(out) for out in self.outs[: max(1, self.layers - 1)]]
        self.query, self.affinity = self.room(self.outs[0]), self.room(self.chunk)
        self.parts = [self.room(self.slices[i][1], self.outs[i + 1]) for i in range(self.layers - 1)]
        following = self.following(0) if several else {"OUT": 1, "BO": 1}
        next_weight, next_input, part = (
            (state.weights[1], state.inputs[1], self.parts[0]) if several else (None, None, None)
        )
        kernels.keys[self.grid(0)](
            self.q, self.k, *self.rows, state.weights[0], state.biases[0], next_weight, state.inputs[0], next_input,
            self.scale, self.z[0], self.query, self.affinity, part,
            **self.slots, **self.depth, **self.slice_of(0), **following, LAYERS=self.layers, **LAUNCH,
        )  # fmt: skip
        for i in range(1, self.layers - 1):
            before = self.before(i)
            kernels.more_keys[self.grid(i)](
                *self.rows, state.biases[i], state.weights[i + 1], state.inputs[i + 1], self.parts[i - 1], self.z[i],
                self.parts[i], **self.common, **self.slice_of(i), BEFORE=before["BEFORE"], BP=before["BQ"],
                **self.following(i), **LAUNCH,
            )  # fmt: skip

    def gradient(self, i: int) -> None:
        """The gradient at layer i's output, for i > 0."""
        state = self.state
        kernels.gradients[self.grid(i)](
            self.k, self.v, self.lr, *self.rows, self.parts[-1], state.weights[i + 1], state.biases[i + 1],
            state.gradients[i + 1], self.z[i], state.gradients[i], *self.norm, self.eps,
            **self.common, **self.slice_of(i), BP=block_of(self.slices[i][1]), **self.following(i),
            LOSS=i + 2 == self.layers, **LAUNCH,
        )  # fmt: skip

    def query_pass(self) -> tuple[Tensor, Tensor | None, dict[str, int]]:
        """The last layer at the query, or its parts, those of its affinities, and how many there are."""
        state = self.state
        if self.layers == 1:
            query = self.room(self.width)
            kernels.linear_queries[self.grid(0)](
                self.k, self.v, self.lr, *self.rows, self.updated, state.weights[0], state.biases[0], state.inputs[0],
                state.gradients[0], self.scale, self.z[0], self.query, self.affinity, query, *self.norm, self.eps,
                **self.slots, **self.depth, S=self.slices[0][0], **LAUNCH,
            )  # fmt: skip
            return query, None, {"BEFORE": 1, "BQ": 1}
        query_parts, affinity_parts, before = None, None, {"BEFORE": 1, "BQ": 1}
        for i in range(self.layers - 1):
            count = self.slices[i][1]
            made: list[Any] = [self.room(count, self.outs[i + 1]), self.room(count, self.chunk)]
            kernels.queries[self.grid(i)](
                self.k, self.v, self.lr, *self.rows, self.updated, state.weights[i], state.biases[i], state.inputs[i],
                state.gradients[i], state.weights[i + 1], state.biases[i + 1], state.inputs[i + 1],
                state.gradients[i + 1], self.scale, self.z[i], self.query, self.affinity, self.parts[-1], query_parts,
                affinity_parts, *made, *self.norm, self.eps,
                **self.slots, **self.depth, **self.slice_of(i), BP=block_of(count), **before, **self.following(i),
                FIRST=i == 0, LOSS=self.layers == 2, **LAUNCH,
            )  # fmt: skip
            (query_parts, affinity_parts), before = made, self.before(i + 1)
        assert query_parts is not None
        return query_parts, affinity_parts, before
