"""TTT-MLP over a whole call by Triton kernels, differentiable.

``mlp_forward`` and ``mlp_backward`` have the kernels. Between the passes, the tokens are kept, z2 at the keys and at
the queries, and the fast weights at the start of each group of chunks.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width, F hidden width, P slices of F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.triton.train_launches import launch
from moshi_ttt.plugins.hybrid.triton.train_settings import TrainSettings


def mlp_chunks(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor],
    norm_weight: Tensor, norm_bias: Tensor, token_scale: Tensor, scale: Tensor, settings: TrainSettings,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """TTT-MLP over T tokens that begin at a chunk's start, with the inner LayerNorm.

    Args:
        q, k, v: ``[B, T, H, D]``; the target is v - k.
        lr: ``[B, T, H]``.
        weights, biases: where to start, ``[B, H, D, F]`` and ``[B, H, F, D]``, ``[B, H, 1, F]`` and ``[B, H, 1, D]``.
        norm_weight, norm_bias: ``[H, D]``.
        token_scale: ``[C]``, per query position.
        scale: ``[B, N]``, of each chunk's update; 0 where there is none.

    Returns:
        ``y [B, T, H, D]``, and weights and biases after the last update, in the dtype of ``q``. Sums are float32.
    """
    (w1, w2), (b1, b2) = weights, biases
    given = (q, k, v, lr, w1, b1, w2, b2, norm_weight, norm_bias, token_scale, scale)
    y, w1, b1, w2, b2 = _FusedMLP.apply(*given, settings)  # type: ignore[no-untyped-call]
    return y, (w1, w2), (b1, b2)


class _MLPLaunches:
    """What the launches of one call share: numbers and constants, by the names of the kernels' arguments.

    Raises ValueError where slices do not fill the hidden width.
    """

    def __init__(self, shape: torch.Size, hidden: int, settings: TrainSettings) -> None:
        batch, self.length, self.heads, self.width = shape
        self.programs = batch * self.heads
        slices, remainder = divmod(hidden, settings.slice_width)
        if remainder:
            raise ValueError(
                f"A hidden width of {hidden} is no whole number of slices of {settings.slice_width}; choose a "
                "slice_width that divides it."
            )
        self.grid, self.parts = (self.programs, slices), (batch, self.heads, slices, settings.chunk, self.width)
        self.whole = {"C": settings.chunk, "D": self.width}
        self.summed = {**self.whole, "SLICES": slices}
        self.sliced = {**self.summed, "S": settings.slice_width, "PRECISION": settings.precision}
        self.chain = {**self.sliced, "GIVEN": settings.given}
        self.causal = {**self.chain, "CAUSAL": settings.causal}
        self.warps = settings.warps


class MLPChunks:
    """The two passes over a call's chunks, as launches.

    Args:
        shape: of the queries, ``[B, T, H, D]``.
        hidden: F.
    """

    def __init__(self, shape: torch.Size, hidden: int, settings: TrainSettings) -> None:
        self.settings, self.sizes = settings, _MLPLaunches(shape, hidden, settings)

    def forward(
        self, tokens: Sequence[Tensor], small: Sequence[Tensor], fast: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``y [B, T, H, D]``, the fast weights after the last update, and what ``backward`` needs beside the arguments.

        Args:
            tokens: q, k, v and lr, contiguous.
            small: the norm's weight and bias, token scale, and the scales of updates, float32 and contiguous.
            fast: W1, b1, W2, b2, as ``small``.
        """
        sizes, every, chunks, now = self.sizes, self.settings.every, small[3].shape[1], tuple(fast)
        z2, zq = (torch.empty(tokens[0].shape, device=now[0].device, dtype=torch.float32) for _ in range(2))
        y = torch.empty_like(tokens[0])
        kept: list[Tensor] = []
        part, next_part = z2.new_empty(sizes.parts), z2.new_empty(sizes.parts)
        together = min(self.settings.parts, chunks)
        query_parts = z2.new_empty(together, *sizes.parts)
        numbers = (sizes.length, sizes.heads)
        launch("mlp_first_keys", sizes.grid, (tokens[1], *now[:3]), (part,), numbers, sizes.sliced, sizes.warps)
        for chunk in range(chunks):
            if chunk % every == 0 and chunk > 0:
                kept += now[:3]
            after = tuple(torch.empty_like(each) for each in now)
            launch(
                "mlp_chunk", sizes.grid, (*tokens, *small, part, *now),
                (z2, next_part, *after, query_parts[chunk % together]), (*numbers, chunks, chunk, self.settings.eps),
                sizes.causal, sizes.warps,
            )  # fmt: skip
            now, part, next_part = after, next_part, part
            if (chunk + 1) % together == 0 or chunk + 1 == chunks:
                first = chunk - chunk % together
                launch(
                    "mlp_outputs", (sizes.programs, chunk + 1 - first), (tokens[0], *small[:2], query_parts), (zq, y),
                    (*numbers, sizes.programs, first, self.settings.eps), sizes.summed, sizes.warps,
                )  # fmt: skip
        return y, now, (z2, zq, *kept)

    def outputs(self, q: Tensor, small: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        """``y`` again, from what ``forward`` kept."""
        y, sizes, chunks = torch.empty_like(q), self.sizes, small[3].shape[1]
        launch(
            "mlp_outputs_again", (sizes.programs, chunks), (q, *small[:2], kept[1]), (y,),
            (sizes.length, sizes.heads, self.settings.eps), sizes.whole, sizes.warps,
        )  # fmt: skip
        return y

    def backward(
        self, tokens: Sequence[Tensor], small: Sequence[Tensor], fast: Sequence[Tensor], kept: Sequence[Tensor],
        dy: Tensor, d_end: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """The gradients of ``tokens``, ``small`` and ``fast``, in their order. b2 is not read.

        ``d_end``: of the fast weights after the call; they become those before it.
        """
        sizes, (z2, zq), chunks, every = self.sizes, kept[:2], small[3].shape[1], self.settings.every
        (batch, _, heads, width), dy, numbers = dy.shape, dy.contiguous(), (sizes.length, sizes.heads)
        dq, dk, dv, d_lr = (torch.empty_like(each) for each in tokens)
        dzq = torch.empty_like(zq)
        # of the queries' norm, then of the keys'
        d_norm = [[z2.new_empty(batch, heads, chunks, width) for _ in range(2)] for _ in range(2)]
        launch(
            "mlp_output_gradients", (sizes.programs, chunks), (dy, zq, small[0]), (dzq, *d_norm[0]),
            (*numbers, chunks, self.settings.eps), sizes.whole, sizes.warps,
        )  # fmt: skip
        chain = _GradientChain(self, tokens, small, z2, dy, dzq, d_end, (dq, dk, dv, d_lr), d_norm[1])
        states = (*fast[:3], *kept[2:])
        for first in reversed(range(0, chunks, every)):
            chain.group(first, min(first + every, chunks), states[3 * (first // every) :][:3])
        norms = [a.sum((0, 2)) + b.sum((0, 2)) for a, b in zip(*d_norm, strict=True)]  # [B, H, N, D] -> [H, D]
        # [B, H, N, P, C] -> [C], and [B, H, N, P] -> [B, N]
        of_small = [*norms, chain.d_token_scale.sum((0, 1, 2, 3)), chain.d_scale.sum((1, 3))]
        return [dq, dk, dv, d_lr], of_small, list(d_end)


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, token_scale: Tensor, scale: Tensor, settings: TrainSettings,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = (norm_weight, norm_bias, token_scale, scale)
        tokens = tuple(part.contiguous() for part in (q, k, v, lr))
        small = tuple(part.float().contiguous() for part in given)
        fast = tuple(part.float().contiguous() for part in (w1, b1, w2, b2))
        ctx.chunks = MLPChunks(q.shape, w1.shape[-1], settings)
        y, end, kept = ctx.chunks.forward(tokens, small, fast)
        ctx.save_for_backward(*tokens, *small, *fast[:3], *kept)
        ctx.dtypes = [each.dtype for each in (q, k, v, lr, w1, b1, w2, b2, *given)]
        return y, *(each.to(w1.dtype) for each in end)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *d_end: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under an activation checkpoint each read computes the call again
        d_fast = tuple(each.float().clone(memory_format=torch.contiguous_format) for each in d_end)
        of_tokens, of_small, of_fast = ctx.chunks.backward(saved[:4], saved[4:8], saved[8:11], saved[11:], dy, d_fast)
        found = (*of_tokens, *of_fast, *of_small)
        return *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None


class _GradientChain:
    """The backward pass from chunk to chunk.

    Args:
        fast: the gradients of W1, b1, W2 and b2 after the last chunk; when all groups are done, before the first.
        dy: the gradients of outputs. dzq: those of z2 at the queries.
        written: the gradients of q, k, v and lr, which it writes.
        d_norm: the keys' part of the norm's gradients ``[B, H, N, D]``, which it writes.
    """

    def __init__(
        self, call: MLPChunks, tokens: Sequence[Tensor], small: Sequence[Tensor], z2: Tensor, dy: Tensor,
        dzq: Tensor, fast: Sequence[Tensor], written: tuple[Tensor, ...], d_norm: list[Tensor],
    ) -> None:  # fmt: skip
        self.settings, self.sizes = call.settings, call.sizes
        self.tokens, self.small, self.z2, self.dy, self.dzq = tokens, small, z2, dy, dzq
        self.fast, self.written, self.d_norm = fast, written, d_norm
        sizes, chunks = self.sizes, small[3].shape[1]
        batch, heads, slices, size, _ = sizes.parts
        hidden = fast[1].shape[-1]
        self.d_token_scale = z2.new_empty(batch, heads, chunks, slices, size)
        self.d_scale = z2.new_empty(batch, heads, chunks, slices)
        # of one chunk: the hidden units' gradients, and the slices' parts of g2's
        self.units = [z2.new_empty(batch, heads, size, hidden) for _ in range(3)]
        self.part = z2.new_empty(sizes.parts)

    def group(self, first: int, last: int, start: Sequence[Tensor]) -> None:
        """Chunks ``last - 1`` to ``first``. ``start``: W1, b1 and W2 before the first."""
        sizes, settings, count = self.sizes, self.settings, last - first
        states: list[Sequence[Tensor]] = [start]
        if count > 1:
            again = [each.new_empty(count - 1, *each.shape) for each in start]
            numbers = (sizes.length, sizes.heads, sizes.programs, self.small[3].shape[1], first, last - 1, settings.eps)
            launch(
                "mlp_states", sizes.grid, (*self.tokens[1:], *self.small[:2], self.small[3], self.z2, *start), again,
                numbers, sizes.chain, sizes.warps,
            )  # fmt: skip
            states += list(zip(*again, strict=True))
        together = min(settings.parts, count)
        dq_parts, dk_parts = (self.z2.new_empty(together, *sizes.parts) for _ in range(2))
        for begin in reversed(range(first, last, together)):
            end = min(begin + together, last)
            for chunk in reversed(range(begin, end)):
                self._chunk(chunk, states[chunk - first], dq_parts[chunk - begin], dk_parts[chunk - begin])
            launch(
                "mlp_token_gradients", (sizes.programs, end - begin), (self.dy, dq_parts, dk_parts), self.written[:2],
                (sizes.length, sizes.heads, sizes.programs, begin), sizes.summed, sizes.warps,
            )  # fmt: skip

    def _chunk(self, chunk: int, now: Sequence[Tensor], dq_part: Tensor, dk_part: Tensor) -> None:
        sizes, small = self.sizes, self.small
        numbers = (sizes.length, sizes.heads, small[3].shape[1], chunk, self.settings.eps)
        tokens, (dw1, db1, dw2, db2), (dx2, dz1, dzq1) = self.tokens, self.fast, self.units
        launch(
            "mlp_second_layer_gradients", sizes.grid, (*tokens, *small, self.z2, self.dzq, *now),
            (dw2, db2, dx2, dzq1, self.part, self.d_token_scale, self.d_scale), numbers, sizes.causal, sizes.warps,
        )  # fmt: skip
        launch(
            "mlp_first_layer_gradients", sizes.grid, (*tokens, *small, self.z2, *now),
            (dw1, db1, dw2, dzq1, dz1, self.part, dq_part, dk_part, self.d_token_scale, self.d_scale), numbers,
            sizes.causal, sizes.warps,
        )  # fmt: skip
        launch(
            "mlp_key_gradients", sizes.grid, (*tokens[1:], *small[:2], self.z2, self.dzq, self.part, *now),
            (*self.fast, dx2, dz1, dk_part, *self.written[2:], *self.d_norm), numbers, sizes.chain, sizes.warps,
        )  # fmt: skip
