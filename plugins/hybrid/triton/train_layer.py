"""A whole training call of the layer by Triton kernels: what is around the inner loop, and the inner loop itself.

Between the passes are kept: the input, the projections (q, k, v in the dtype of products, the rates), what the inner
loop's chunks keep, the post norm's output and what is added. Everything else is computed again: normalized, rotated and
masked tokens, targets, casts.

``train_surroundings`` has the kernels around the inner loop, ``mlp_chunk`` and ``linear_chunk`` have the inner loop.

Shape legend: B rows, T tokens, H heads, D head width, N width of the host (H D), C tokens a chunk, P programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.triton.linear_chunk import LinearChunks
from moshi_ttt.plugins.hybrid.triton.mlp_chunk import MLPChunks
from moshi_ttt.plugins.hybrid.triton.step_blocks import block_of
from moshi_ttt.plugins.hybrid.triton.train_launches import launch
from moshi_ttt.plugins.hybrid.triton.train_settings import EACH, GATED, TrainSettings

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


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What a call continues. No gradient is taken of it.

    Attributes:
        position: ``[B]`` int64, tokens of the first chunk that came before the call.
        spoiled: ``[B]`` int64, those of them that may not enter.
        keys, gradients: ``[B, H, C, D]``, theirs: k, and g of the last layer.
    """

    position: Tensor
    spoiled: Tensor
    keys: Tensor
    gradients: Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a call gives beside its output.

    Attributes:
        num_nonfinite: ``[B, chunks]`` int64, tokens of each chunk that may not enter, where updates are enabled.
        fast: the fast weights after the last whole chunk, ``[B, H, any, any]`` each.
        keys, values, rates: of slots, ``[B, slots, H, D]`` and ``[B, slots, H]``.
    """

    num_nonfinite: Tensor
    fast: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    rates: Tensor


def inner_layer(
    projections: tuple[Tensor, ...], finite: Tensor, updated: Tensor | None, norm: tuple[Tensor, Tensor],
    token_scale: Tensor, post_norm: tuple[Tensor, Tensor], fast: tuple[Tensor, ...], numbers: LayerNumbers,
    continued: Continued | None = None,
) -> tuple[Tensor, Found]:  # fmt: skip
    """From projections to the post norm's output ``[B, T, N]``.

    Args:
        projections: q, k, v ``[B, T, N]``, and ``[B, T, H]`` the rates, before the sigmoid.
        finite: ``[B, T]`` uint8, tokens that may enter as far as x says.
        updated: ``[B]`` bool, rows whose updates are enabled; None: all.
        norm: weight and bias of the inner LayerNorm, ``[H, D]``. post_norm: those of the post norm, ``[N]``.
        token_scale: ``[C]``.
        fast: W and b, or W1, b1, W2 and b2: the learned initial ones, ``[H, any, any]``; of a call that continues,
            those at the start of the first chunk, ``[B, H, any, any]``.
    """
    given = (*projections, *norm, token_scale, *post_norm, *fast)
    out, counts, keys, values, rates, *end = _InnerLayer.apply(  # type: ignore[no-untyped-call]
        numbers, continued, finite, updated, *given
    )
    return out, Found(num_nonfinite=counts, fast=tuple(end), keys=keys, values=values, rates=rates)


class _Surroundings:
    """The launches around the inner loop, of one call.

    Attributes:
        shape: of the inner loop's tensors, ``[B, slots, H, D]``.
    """

    def __init__(self, q: Tensor, updated: Tensor | None, continued: Continued | None, numbers: LayerNumbers) -> None:
        (batch, self.length, width), heads, size = q.shape, numbers.heads, numbers.settings.chunk
        self.numbers, self.updated, self.continued = numbers, updated, continued
        slots = size * -(-(self.length + (0 if continued is None else size - 1)) // size)
        self.shape = torch.Size((batch, slots, heads, width // heads))
        self.count, self.programs = batch * slots, -(-batch * slots // EACH)
        self.at_a_time = EACH if q.device.type == "cpu" else 1  # interpreted, a program is slow and its width is not
        self.begins = {"CONTINUED": continued is not None, "BT": self.at_a_time}
        self.grid = (-(-self.count // self.at_a_time),)
        self.heads = {
            "H": heads, "BH": block_of(heads), "D": width // heads, "C": size, "ALL": updated is None, **self.begins,
        }  # fmt: skip
        self.norm = {"N": width, "BN": block_of(width), **self.begins}
        self.sizes = (self.length, slots)
        self.rates = (numbers.base_rate, numbers.factor, math.log2(numbers.theta), numbers.target_eps)

    def tokens(
        self, projections: tuple[Tensor, ...], finite: Tensor, norm: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """q, k, v ``[B, slots, H, D]`` and lr ``[B, slots, H]``; ``[B, slots]`` uint8, 0 for what may not enter."""
        made = [torch.empty(self.shape, device=finite.device, dtype=torch.float32) for _ in range(3)]
        made.append(made[0].new_empty(self.shape[:3]))
        ok, before = finite.new_empty(self.shape[:2]), self.continued
        earlier = (finite, norm[0], norm[0]) if before is None else (before.position, before.keys, before.gradients)
        launch(
            "tokens", self.grid, (*projections, finite, self._updated(finite), *norm, *earlier), (*made, ok),
            (self.count, *self.sizes, *self.rates, largest_factor(torch.float32)), self.heads, WARPS,
        )  # fmt: skip
        return tuple(made), ok

    def token_gradients(
        self, projections: tuple[Tensor, ...], ok: Tensor, norm_weight: Tensor, gradients: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of the projections, and of the inner norm's weight and bias as far as the target has a part."""
        made = [torch.empty_like(each) for each in projections]
        of_norm = [gradients[0].new_empty(self.programs, *self.shape[2:]) for _ in range(2)]
        given = (*projections, ok, self._updated(ok), norm_weight, self._position(ok), *gradients)
        launch(
            "token_gradients", (self.programs,), given, (*made, *of_norm), (self.count, *self.sizes, *self.rates),
            {**self.heads, "EACH": EACH}, WARPS,
        )  # fmt: skip
        return made, [each.sum(0) for each in of_norm]  # [P, H, D] -> [H, D]

    def post_norm(self, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``[B, T, N]``, of ``y [B, slots, H, D]``."""
        out = torch.empty(len(y), self.length, len(weight), device=y.device, dtype=self.numbers.output)
        launch(
            "post_norm", self.grid, (y, weight, bias, self._position(y)), (out,),
            (self.count, *self.sizes, self.numbers.post_norm_eps), self.norm, WARPS,
        )  # fmt: skip
        return out

    def post_norm_gradients(self, y: Tensor, d_out: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradient of ``y``, and those of weight and bias."""
        dy, of_norm = torch.empty_like(y), [y.new_empty(self.programs, len(weight)) for _ in range(2)]
        launch(
            "norm_gradients", (self.programs,), (y, d_out, weight, self._position(y)), (dy, *of_norm),
            (self.count, *self.sizes, self.numbers.post_norm_eps), {**self.norm, "EACH": EACH}, WARPS,
        )  # fmt: skip
        return dy, [each.sum(0) for each in of_norm]  # [P, N] -> [N]

    def scales(self, ok: Tensor, token_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each chunk, ``[B, chunks]``: tokens that may not enter, whether its update is applied, and its scale."""
        size, before = self.numbers.settings.chunk, self.continued
        out = ok == 0 if self.updated is None else (ok == 0) & self.updated[:, None]  # [B, slots]
        counts = out.view(len(ok), -1, size).sum(2)  # [B, slots] -> [B, chunks, C] -> [B, chunks]
        if before is not None:
            counts[:, 0] += before.spoiled
        end = size * torch.arange(1, counts.shape[1] + 1, device=ok.device)  # [chunks]
        ended = end <= self.length + (0 if before is None else before.position[:, None])  # [chunks] or [B, chunks]
        applied = (counts == 0) & ended
        return counts, applied, torch.where(applied, token_scale[-1], 0)

    def _updated(self, other: Tensor) -> Tensor:
        """The mask, or, where there is none, a tensor that is not read."""
        return other if self.updated is None else self.updated.view(torch.uint8)

    def _position(self, other: Tensor) -> Tensor:
        return other if self.continued is None else self.continued.position


def chunks_of(shape: torch.Size, fast: tuple[Tensor, ...], settings: TrainSettings) -> MLPChunks | LinearChunks:
    """The two passes over a call's chunks, for W and b, or W1, b1, W2 and b2; ``shape`` is that of the queries."""
    return MLPChunks(shape, fast[0].shape[-1], settings) if len(fast) == 4 else LinearChunks(shape, settings)


def _of_rows(fast: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Fast weights of each row: ``[H, any, any]``, or ``[B, H, any, any]``, to ``[B, H, any, any]`` float32."""
    return tuple(each.float().expand(batch, *each.shape[-3:]).contiguous() for each in fast)


class _InnerLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, numbers: LayerNumbers, continued: Continued | None, finite: Tensor, updated: Tensor | None,
        *given: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        projections = tuple(each.contiguous() for each in given[:4])
        norm_w, norm_b, token_scale, post_w, post_b = (each.float().contiguous() for each in given[4:9])
        fast, around = given[9:], _Surroundings(projections[0], updated, continued, numbers)
        tokens, ok = around.tokens(projections, finite, (norm_w, norm_b))
        counts, applied, scale = around.scales(ok, token_scale)
        chunks = chunks_of(around.shape, fast, numbers.settings)
        y, end, kept = chunks.forward(tokens, (norm_w, norm_b, token_scale, scale), _of_rows(fast, len(ok)))
        out = around.post_norm(y, post_w, post_b)
        ctx.save_for_backward(
            *projections, norm_w, norm_b, token_scale, post_w, scale, ok, finite, applied, *fast, *kept
        )
        ctx.numbers, ctx.continued, ctx.updated, ctx.fast = numbers, continued, updated, len(fast)
        ctx.dtypes = [each.dtype for each in given]
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return out, counts, *tokens[1:], *end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, _: None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under an activation checkpoint each read computes the call again
        projections, (norm_w, norm_b, token_scale, post_w, scale, ok, finite, applied) = saved[:4], saved[4:12]
        fast, kept = saved[12 : 12 + ctx.fast], saved[12 + ctx.fast :]
        around = _Surroundings(projections[0], ctx.updated, ctx.continued, ctx.numbers)
        tokens = around.tokens(projections, finite, (norm_w, norm_b))[0]
        small, chunks = (norm_w, norm_b, token_scale, scale), chunks_of(around.shape, fast, ctx.numbers.settings)
        y = chunks.outputs(tokens[0], small, kept)
        if d_out is None:  # only the state after the call has a gradient
            d_out = torch.zeros(*finite.shape, len(post_w), device=y.device, dtype=ctx.numbers.output)
        dy, of_post = around.post_norm_gradients(y, d_out.contiguous(), post_w)
        start = _of_rows(fast, len(ok))
        d_end = [
            torch.zeros_like(each) if given is None else given.clone(memory_format=torch.contiguous_format)
            for each, given in zip(start, others[3:], strict=True)
        ]
        of_tokens, (d_norm_w, d_norm_b, d_scales, d_scale), of_fast = chunks.backward(
            tokens, small, start, kept, dy, d_end
        )
        for index, more in enumerate(others[:3], 1):  # of keys, values and rates, by the unfinished chunk
            if more is not None:
                of_tokens[index] = of_tokens[index] + more
        d_projections, (more_w, more_b) = around.token_gradients(projections, ok, norm_w, of_tokens)
        d_scales[-1] += torch.where(applied, d_scale, 0).sum()
        found = [*d_projections, d_norm_w + more_w, d_norm_b + more_b, d_scales, *of_post]
        # [B, H, any, any], and of what all rows share [H, any, any]
        found += of_fast if ctx.continued is not None else [each.sum(0) for each in of_fast]
        return None, None, None, None, *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True))


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
        launch("gated", ctx.grid, (x, added, alpha, rows), (out,), (length, ctx.number), ctx.constants, WARPS)
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
            (count, ctx.length, ctx.number), {**ctx.constants, "EACH": EACH}, WARPS,
        )  # fmt: skip
        total = d_gate.sum(0)  # [P, N] -> [N]
        return d_out, d_added, (total.sum(0, keepdim=True) if ctx.constants["ONE"] else total).to(alpha.dtype), None
