"""A whole training call of the layer by Triton kernels: what is around the inner loop, and the inner loop itself.

For a call that starts a sequence, all of whose state is the learned initial one. Between the passes are kept: the input,
the projections (q, k, v in the dtype of products, the rates), what the inner loop's chunks keep, the post norm's output
and what is added. Everything else is computed again: normalized, rotated and masked tokens, targets, casts.

``train_surroundings`` has the kernels around the inner loop, ``mlp_chunk`` and ``linear_chunk`` have the inner loop.

Shape legend: B rows, T tokens, H heads, D head width, N width of the host (H D), C tokens a chunk, P programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.triton.linear_chunk import LinearChunks
from moshi_ttt.plugins.hybrid.triton.mlp_chunk import MLPChunks
from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of
from moshi_ttt.plugins.hybrid.triton.train_launches import launch
from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings

EACH = 16
"""Tokens of a program that adds up gradients of parameters."""
GATED = 1024
"""Channels of a program of the gate."""
WARPS = 8


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """What is no tensor.

    Attributes:
        settings: of the inner loop.
        heads: H.
        base_rate: base_lr / D. factor: what rates are multiplied by besides.
        theta: base of the rotary frequencies. target_eps, post_norm_eps: as in the options.
        output: the dtype of the post norm's output.
    """

    settings: TrainSettings
    heads: int
    base_rate: float
    factor: float
    theta: float
    target_eps: float
    post_norm_eps: float
    output: torch.dtype


def inner_layer(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, finite: Tensor, updated: Tensor | None, norm: tuple[Tensor, Tensor],
    token_scale: Tensor, post_norm: tuple[Tensor, Tensor], fast: tuple[Tensor, ...], numbers: LayerNumbers,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """From projections to the post norm's output ``[B, T, N]``.

    Also ``[B, number of chunks]`` bool, chunks with a token that may not enter, and the fast weights after the last
    whole chunk, ``[B, H, any, any]`` for each of ``fast``; no gradient passes through these.

    Args:
        q, k, v: ``[B, T, N]``. rate: ``[B, T, H]``, before the sigmoid.
        finite: ``[B, T]`` uint8, tokens that may enter as far as x says.
        updated: ``[B]`` bool, rows whose updates are enabled; None: all.
        norm: weight and bias of the inner LayerNorm, ``[H, D]``. post_norm: those of the post norm, ``[N]``.
        token_scale: ``[C]``.
        fast: the learned initial fast weights: W and b, or W1, b1, W2 and b2, ``[H, any, any]``.
    """
    out, spoiled, *end = _InnerLayer.apply(  # type: ignore[no-untyped-call]
        numbers, finite, updated, q, k, v, rate, *norm, token_scale, *post_norm, *fast
    )
    return out, spoiled, tuple(end)


class _Surroundings:
    """The launches around the inner loop, of one call."""

    def __init__(self, q: Tensor, updated: Tensor | None, numbers: LayerNumbers) -> None:
        (batch, length, width), heads = q.shape, numbers.heads
        self.numbers, self.updated = numbers, updated
        self.shape = torch.Size((batch, length, heads, width // heads))
        self.count, self.programs = batch * length, -(-batch * length // EACH)
        self.heads = {
            "H": heads, "BH": block_of(heads), "D": width // heads, "C": numbers.settings.chunk, "ALL": updated is None,
        }  # fmt: skip
        self.norm = {"N": width, "BN": block_of(width)}
        self.rates = (numbers.base_rate, numbers.factor, math.log2(numbers.theta), numbers.target_eps)

    def tokens(
        self, projections: tuple[Tensor, ...], finite: Tensor, norm: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v ``[B, T, H, D]`` and lr ``[B, T, H]``, and ``[B, T]`` uint8: 1 for tokens that may enter."""
        made = [torch.empty(self.shape, device=finite.device, dtype=torch.float32) for _ in range(3)]
        made.append(made[0].new_empty(self.shape[:3]))
        ok = torch.empty_like(finite)
        launch(
            "tokens", (self.count,), (*projections, finite, self._updated(finite), *norm), (*made, ok),
            (self.shape[1], *self.rates, largest_factor(torch.float32)), self.heads, WARPS,
        )  # fmt: skip
        return tuple(made), ok

    def token_gradients(
        self, projections: tuple[Tensor, ...], ok: Tensor, norm_weight: Tensor, gradients: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the projections, and of the inner norm's weight and bias as far as the target has a part."""
        made = [torch.empty_like(each) for each in projections]
        of_norm = [gradients[0].new_empty(self.programs, *self.shape[2:]) for _ in range(2)]
        launch(
            "token_gradients", (self.programs,), (*projections, ok, self._updated(ok), norm_weight, *gradients),
            (*made, *of_norm), (self.count, self.shape[1], *self.rates), {**self.heads, "EACH": EACH}, WARPS,
        )  # fmt: skip
        return made, [each.sum(0) for each in of_norm]  # [P, H, D] -> [H, D]

    def post_norm(self, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``[B, T, N]``, of ``y [B, T, H, D]``."""
        out = torch.empty(*y.shape[:2], y.shape[2] * y.shape[3], device=y.device, dtype=self.numbers.output)
        launch("norm", (self.count,), (y, weight, bias), (out,), (self.numbers.post_norm_eps,), self.norm, WARPS)
        return out

    def post_norm_gradients(self, y: Tensor, d_out: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradient of ``y``, and those of weight and bias."""
        dy, of_norm = torch.empty_like(y), [y.new_empty(self.programs, weight.shape[0]) for _ in range(2)]
        launch(
            "norm_gradients", (self.programs,), (y, d_out, weight), (dy, *of_norm),
            (self.count, self.numbers.post_norm_eps), {**self.norm, "EACH": EACH}, WARPS,
        )  # fmt: skip
        return dy, [each.sum(0) for each in of_norm]  # [P, N] -> [N]

    def _updated(self, other: Tensor) -> Tensor:
        """The mask, or, where there is none, a tensor that is not read."""
        return other if self.updated is None else self.updated.view(torch.uint8)


def _chunks_of(shape: torch.Size, fast: tuple[Tensor, ...], settings: TrainSettings) -> MLPChunks | LinearChunks:
    return MLPChunks(shape, fast[0].shape[-1], settings) if len(fast) == 4 else LinearChunks(shape, settings)


def _of_rows(fast: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Fast weights for each row: ``[H, any, any]`` to ``[B, H, any, any]``, float32."""
    return tuple(each.float().expand(batch, *each.shape).contiguous() for each in fast)


def _spoiled(ok: Tensor, updated: Tensor | None, size: int) -> Tensor:
    """``[B, number of chunks]`` bool: chunks with a token that may not enter, in rows whose updates are enabled."""
    spoiled = ok == 0  # [B, T]
    if updated is not None:
        spoiled = spoiled & updated[:, None]
    batch, length = ok.shape
    padded = F.pad(spoiled, (0, -length % size))
    return padded.view(batch, -1, size).any(2)  # [B, N C] -> [B, N, C] -> [B, N]


class _InnerLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, numbers: LayerNumbers, finite: Tensor, updated: Tensor | None, *given: Tensor
    ) -> tuple[Tensor, ...]:
        projections = tuple(each.contiguous() for each in given[:4])
        norm_w, norm_b, token_scale, post_w, post_b = (each.float().contiguous() for each in given[4:9])
        fast, size = given[9:], numbers.settings.chunk
        around = _Surroundings(projections[0], updated, numbers)
        tokens, ok = around.tokens(projections, finite, (norm_w, norm_b))
        spoiled = _spoiled(ok, updated, size)
        whole = around.shape[1] // size
        applied = ~spoiled
        applied[:, whole:] = False  # a chunk that the call does not end
        scale = torch.where(applied, token_scale[-1], 0)
        chunks = _chunks_of(around.shape, fast, numbers.settings)
        y, end, kept = chunks.forward(tokens, (norm_w, norm_b, token_scale, scale), _of_rows(fast, len(ok)))
        out = around.post_norm(y, post_w, post_b)
        ctx.save_for_backward(
            *projections, norm_w, norm_b, token_scale, post_w, scale, ok, finite, applied, *fast, *kept
        )
        ctx.numbers, ctx.updated, ctx.fast = numbers, updated, len(fast)
        ctx.dtypes = [each.dtype for each in given]
        ctx.mark_non_differentiable(spoiled, *end)
        ctx.set_materialize_grads(False)
        return out, spoiled, *end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * (3 + len(ctx.dtypes))
        saved = ctx.saved_tensors  # read once: under an activation checkpoint each read computes the call again
        projections, (norm_w, norm_b, token_scale, post_w, scale, ok, finite, applied) = saved[:4], saved[4:12]
        fast, kept = saved[12 : 12 + ctx.fast], saved[12 + ctx.fast :]
        around = _Surroundings(projections[0], ctx.updated, ctx.numbers)
        tokens, _ = around.tokens(projections, finite, (norm_w, norm_b))
        small, chunks = (norm_w, norm_b, token_scale, scale), _chunks_of(around.shape, fast, ctx.numbers.settings)
        y = chunks.outputs(tokens[0], small, kept)
        dy, of_post = around.post_norm_gradients(y, d_out.contiguous(), post_w)
        start = _of_rows(fast, len(ok))
        d_end = [torch.zeros_like(each) for each in start]
        of_tokens, (d_norm_w, d_norm_b, d_scales, d_scale), of_fast = chunks.backward(
            tokens, small, start, kept, dy, d_end
        )
        d_projections, (more_w, more_b) = around.token_gradients(projections, ok, norm_w, of_tokens)
        d_scales[-1] += torch.where(applied, d_scale, 0).sum()
        found = (*d_projections, d_norm_w + more_w, d_norm_b + more_b, d_scales, *of_post)
        rows = (each.sum(0) for each in of_fast)  # [B, H, any, any] -> [H, any, any]
        return None, None, None, *(each.to(dtype) for each, dtype in zip((*found, *rows), ctx.dtypes, strict=True))


def gated(x: Tensor, added: Tensor, alpha: Tensor, volume: float | Tensor) -> Tensor:
    """``x + volume * tanh(alpha) * added``, in float32, in the dtype of ``x``; bit for bit ``x`` where the volume is 0.

    Args:
        x, added: ``[B, T, N]``.
        alpha: ``[N]`` or ``[1]``.
        volume: a number, or ``[B]``.
    """
    out: Tensor = _Gated.apply(x, added, alpha, volume)  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, alpha: Tensor, volume: float | Tensor) -> Tensor:
        x, added, by_row = x.contiguous(), added.contiguous(), isinstance(volume, Tensor)
        batch, length, width = x.shape
        rows = volume.float().contiguous() if isinstance(volume, Tensor) else alpha
        ctx.number, out = 1.0 if isinstance(volume, Tensor) else float(volume), torch.empty_like(x)
        ctx.constants = {"N": width, "BN": min(GATED, block_of(width)), "ONE": alpha.numel() == 1, "BY_ROW": by_row}
        ctx.grid, ctx.length = (batch * length, -(-width // ctx.constants["BN"])), length
        launch("gated", ctx.grid, (x, added, alpha, rows), (out,), (length, ctx.number), ctx.constants, 4)
        ctx.save_for_backward(added, alpha, rows)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        added, alpha, rows = ctx.saved_tensors
        count, blocks = ctx.grid
        programs, width = -(-count // EACH), ctx.constants["N"]
        d_added, d_gate = torch.empty_like(added), added.new_empty(programs, width, dtype=torch.float32)
        launch(
            "gate_gradients", (programs, blocks), (d_out.contiguous(), added, alpha, rows), (d_added, d_gate),
            (count, ctx.length, ctx.number), {**ctx.constants, "EACH": EACH}, 4,
        )  # fmt: skip
        total = d_gate.sum(0)  # [P, N] -> [N]
        return d_out, d_added, (total.sum(0, keepdim=True) if ctx.constants["ONE"] else total).to(alpha.dtype), None
