"""The chunk form of the inner loop with its backward pass written out: the published form, in float32 and float64.

It computes what ``chunk`` does, with a third of the operations, and keeps less between the passes. ``chunk_passes`` has
one chunk; this goes through all of them. What does not depend on the fast weights, the products of queries with keys
and the output's LayerNorm, is computed for all chunks at once.

Shape legend: B streams, H heads, R = B H rows, T tokens, N chunks, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.plugins.hybrid.chunk_passes import (
    ChunkTokens,
    ChunkValues,
    Earlier,
    Shared,
    TokenGradients,
    Upstream,
    backward,
    key_and_query_pass,
    memory_of,
    update,
)
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective

Tensors = tuple[Tensor, ...]


def is_written_out(norm: Objective, rule: UpdateRule, dtype: torch.dtype) -> bool:
    """Whether this module computes the inner loop with these options."""
    published = isinstance(norm, InnerNorm) and not norm.exact and rule.momentum is None and rule.steps == 1
    return published and dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


@dataclass
class _Plan:
    """What a group of chunks shares that has no gradient.

    Attributes:
        eps: of the inner LayerNorm.
        first, last: the chunks of the group, ``first`` to ``last - 1``.
        applied: ``[R, 1, 1]`` of each chunk of the call, 1 where its update is applied, else 0; None where no row ends
            the chunk.
        stops: ``[R, 1, 1]`` bool of each chunk, the rows whose call ends in it; None where no row does.
        slots: ``[R, C, 1]`` bool, the slots of chunk 0 with tokens from before the call; None where there are none.
        layers: L. recompute: keep nothing but the arguments between the passes.
    """

    eps: float
    first: int
    last: int
    applied: Sequence[Tensor | None]
    stops: Sequence[Tensor | None]
    slots: Tensor | None
    layers: int
    recompute: bool = False

    def earlier(self, n: int, parts: _Arguments) -> Earlier | None:
        if n or self.slots is None:
            return None
        return Earlier(self.slots, parts.earlier_inputs, parts.earlier_gradients)


@dataclass
class _Arguments:
    """The tensors of a group: of its tokens ``[N, R, C, any]``, shared ones, and of what it starts from, by layer.

    Attributes:
        step: ``[]``, -token_scale[-1].
        inputs, gradients: of the unfinished chunk, a_i of layers 1 and up, and g_i.
    """

    both: Tensor
    bias: Tensor
    rate: Tensor
    affinity: Tensor
    gamma: Tensor
    mask: Tensor
    step: Tensor
    weights: Tensors
    biases: Tensors
    inputs: Tensors
    gradients: Tensors
    earlier_inputs: Tensors
    earlier_gradients: Tensors

    def tensors(self) -> Tensors:
        return (
            self.both, self.bias, self.rate, self.affinity, self.gamma, self.mask, self.step, *self.weights, *self.biases,
            *self.inputs, *self.gradients, *self.earlier_inputs, *self.earlier_gradients,
        )  # fmt: skip

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> _Arguments:
        """The inverse of ``tensors``."""
        start, parts = 7, []
        for count in (layers, layers, layers - 1, layers, layers - 1, layers):
            parts.append(tuple(tensors[start : start + count]))
            start += count
        return cls(*tensors[:7], *parts)

    def chunk(self, n: int) -> ChunkTokens:
        return ChunkTokens(self.both[n], self.bias[n], self.rate[n], self.affinity[n])


@dataclass
class _Kept:
    """What the backward pass of a group needs beside its arguments: the values of each chunk, and some fast weights.

    Attributes:
        weights: W_i at the start of every ``stride`` chunks; those between are computed again from the values, by the
            same operations.
    """

    values: list[ChunkValues]
    weights: list[Tensors]

    @staticmethod
    def stride(chunks: int) -> int:
        """About the square root of their number: so many are kept, and so many made again, at a time."""
        return max(1, round(chunks**0.5))

    def tensors(self) -> Tensors:
        parts = [*(values.tensors() for values in self.values), *self.weights]
        return tuple(tensor for part in parts for tensor in part)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], chunks: int, layers: int) -> _Kept:
        """The inverse of ``tensors``."""
        each = 4 * layers + 1
        values = [ChunkValues.of(tensors[n * each : (n + 1) * each], layers) for n in range(chunks)]
        rest = tensors[chunks * each :]
        return cls(values, [tuple(rest[i : i + layers]) for i in range(0, len(rest), layers)])


def _forward(plan: _Plan, given: _Arguments, keep: bool) -> tuple[Tensor, Tensors, _Kept]:
    """u_{L-1} of all chunks ``[N, R, C, D]``; the fast weights and the unfinished chunk after them; what is kept."""
    shared = Shared(given.gamma, given.mask, plan.eps)
    biases, inputs, gradients = given.biases, given.inputs, given.gradients
    weights, mine = given.weights, False  # whether they may be written to
    output = torch.empty_like(given.bias)
    kept = _Kept([], [])
    stride = kept.stride(plan.last - plan.first)
    for n in range(plan.first, plan.last):
        at = n - plan.first
        if keep and at % stride == 0:
            kept.weights.append(weights)
            mine = False
        values, a, g = key_and_query_pass(given.chunk(at), weights, biases, shared, plan.earlier(n, given))
        output[at] = values.queries[-1]
        if keep:
            kept.values.append(values)
        if (stops := plan.stops[n]) is not None:
            inputs = tuple(torch.where(stops, new, old) for new, old in zip(a[1:], inputs, strict=True))
            gradients = tuple(torch.where(stops, new, old) for new, old in zip(g, gradients, strict=True))
        if (applied := plan.applied[n]) is not None:
            into = weights if mine else tuple(torch.empty_like(weight) for weight in weights)
            added = update(weights, a, g, applied * given.step, into)
            weights, mine = into, True
            biases = tuple(bias + more for bias, more in zip(biases, added, strict=True))
    return output, (*weights, *biases, *inputs, *gradients), kept


def _weights_again(plan: _Plan, given: _Arguments, kept: _Kept) -> Iterator[tuple[int, Tensors]]:
    """Each chunk of the group and its fast weights, the last chunk first."""
    count = plan.last - plan.first
    stride = kept.stride(count)
    buffers = [tuple(torch.empty_like(weight) for weight in given.weights) for _ in range(min(stride, count) - 1)]
    for begin in range((count - 1) // stride * stride, -1, -stride):
        found = [kept.weights[begin // stride]]
        for at, buffer in zip(range(begin, min(begin + stride, count) - 1), buffers, strict=False):
            n, values = plan.first + at, kept.values[at]
            applied = plan.applied[n]
            assert applied is not None  # only the chunks at the end of a call can be without an update
            update(found[-1], *memory_of(given.chunk(at), values, plan.earlier(n, given)), applied * given.step, buffer)
            found.append(buffer)
        for at in range(begin + len(found) - 1, begin - 1, -1):
            yield plan.first + at, found[at - begin]


class _Group(torch.autograd.Function):
    """Chunks ``plan.first`` to ``plan.last - 1``, as ``_forward`` computes them."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensors:
        given = _Arguments.of(tensors, plan.layers)
        output, after, kept = _forward(plan, given, keep=not plan.recompute)
        ctx.plan, ctx.arguments = plan, len(tensors)
        ctx.save_for_backward(*tensors, *kept.tensors())
        # What passed through unchanged is a view of it: an output that is an input would be taken for written to.
        after = tuple(each.view_as(each) if any(each is old for old in tensors) else each for each in after)
        return output, *after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_output: Tensor, *of_after: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        tensors = ctx.saved_tensors
        given = _Arguments.of(tensors[: ctx.arguments], plan.layers)
        if plan.recompute:
            kept = _forward(plan, given, keep=True)[2]
        else:
            kept = _Kept.of(tensors[ctx.arguments :], plan.last - plan.first, plan.layers)
        return None, *_backward(plan, given, kept, of_output, of_after).tensors()


def _backward(
    plan: _Plan, given: _Arguments, kept: _Kept, of_output: Tensor, of_after: Tensors
) -> _Arguments:
    """The gradients of ``given``."""
    shared = Shared(given.gamma, given.mask, plan.eps)
    layers = plan.layers
    ends = (layers, 2 * layers, 3 * layers - 1)
    weights = [each.clone(memory_format=torch.contiguous_format) for each in of_after[: ends[0]]]
    biases = [each.clone(memory_format=torch.contiguous_format) for each in of_after[ends[0] : ends[1]]]
    inputs, gradients = list(of_after[ends[1] : ends[2]]), list(of_after[ends[2] :])
    tokens = [torch.empty_like(part) for part in (given.both, given.bias, given.rate, given.affinity)]
    gamma, mask, step = torch.zeros_like(given.gamma), torch.zeros_like(given.mask), torch.zeros_like(given.step)
    earlier: list[list[Tensor]] = [list(map(torch.zeros_like, p)) for p in (given.earlier_inputs, given.earlier_gradients)]
    for n, fast in _weights_again(plan, given, kept):
        at, stops, applied = n - plan.first, plan.stops[n], plan.applied[n]
        upstream = Upstream(of_output[at], weights, biases)
        if stops is not None:
            upstream.inputs = [torch.where(stops, each, 0) for each in inputs]
            upstream.gradients = [torch.where(stops, each, 0) for each in gradients]
            inputs = [torch.where(stops, 0, each) for each in inputs]
            gradients = [torch.where(stops, 0, each) for each in gradients]
        factor = None if applied is None else applied * given.step
        found = backward(given.chunk(at), kept.values[at], fast, shared, plan.earlier(n, given), factor, upstream)
        for whole, part in zip(tokens, _of_tokens(found), strict=True):
            whole[at] = part
        gamma += found.gamma.sum(1, keepdim=True)  # [R, C, D] -> [R, 1, D]
        for product in found.products:
            mask += product.sum(0)  # [R, C, C] -> [C, C]
        if applied is not None and found.step is not None:
            step += (applied * found.step).sum()
        if plan.earlier(n, given) is not None:
            earlier = [found.earlier_inputs, found.earlier_gradients]
    return _Arguments(
        *tokens, gamma, mask, step, tuple(weights), tuple(biases), tuple(inputs), tuple(gradients), tuple(earlier[0]),
        tuple(earlier[1]),
    )  # fmt: skip


def _of_tokens(found: TokenGradients) -> Tensors:
    return found.both, found.bias, found.rate, found.affinity


def written_out_inner_loop(
    tokens: Tokens,
    fast: FastNetwork,
    earlier: ChunkMemory,
    norm: InnerNorm,
    token_scale: Tensor,
    *,
    layout: ChunkLayout,
    causal: bool,
    checkpoint_chunks: int | None,
    position: Tensor,
    applied: Tensor,
) -> tuple[Tensor, FastNetwork, ChunkMemory]:
    """``y [B, T, H D]``, the fast weights and the unfinished chunk after the last token.

    Args:
        tokens: finite, ``[B, T, H, any]``.
        fast, earlier: what the call starts from, ``[B, H, any, any]``.
        position: ``[B]``, tokens of the first chunk that came before the call.
        applied: ``[B, N]`` bool, chunks whose update is applied if they end in this call.

    The rest is as in ``chunk_inner_loop``.
    """
    rows = _Rows(tokens.q.shape[0], tokens.q.shape[2])
    q, k, v, lr = (rows.of_tokens(part, layout) for part in tokens)  # [N, R, C, any]
    begun = None
    if layout.offset is not None:
        slot = torch.arange(layout.chunk_size, device=position.device)
        begun = rows.of_mask((slot < position[:, None])[..., None])  # [B, C, 1] -> [R, C, 1]
        first = torch.where(begun, earlier.inputs[0].flatten(0, 1), k[0])  # [B, H, C, D] -> [R, C, D]
        k = torch.cat([first[None], k[1:]])
    gamma, beta = (rows.of_heads(each) for each in (norm.weight, norm.bias))  # [H, D] -> [R, 1, D]
    mask = -token_scale[:, None].expand(-1, layout.chunk_size)  # [C, C]: query, key
    mask = mask.tril() if causal else mask
    affinity = torch.addcmul(mask, q @ k.mT, mask)  # [N, R, C, C]
    after = position + layout.length
    plan = _Plan(
        norm.eps, 0, 0, _applied(layout, after, applied, rows, q.dtype), _stops(layout, after, rows), begun,
        len(fast.weights),
    )  # fmt: skip
    given = _Arguments(
        torch.cat([k, q], 2), beta - norm.target(v, k), gamma * lr, affinity, gamma, mask, -token_scale[-1],
        *(tuple(t.flatten(0, 1) for t in part) for part in (fast.weights, fast.biases)),  # [B, H, a, b] -> [R, a, b]
        *(tuple(torch.zeros_like(t).flatten(0, 1) for t in part) for part in (earlier.inputs[1:], earlier.gradients)),
        *(tuple(t.flatten(0, 1) for t in part) for part in (earlier.inputs[1:], earlier.gradients)),
    )  # fmt: skip
    u, (weights, biases, inputs, gradients) = _in_groups(plan, given, checkpoint_chunks)
    # [N, R, C, D] -> [B, H, N, C, D]
    y = (q + torch.nn.functional.layer_norm(u, u.shape[-1:], eps=norm.eps) * gamma + beta)
    y = layout.merge(y.unflatten(1, (rows.batch, rows.heads)).permute(1, 2, 0, 3, 4))
    left = _unfinished(layout, after, rows, (k, *inputs), gradients)
    return y, FastNetwork(*(tuple(map(rows.restore, part)) for part in (weights, biases))), left


@dataclass
class _Rows:
    """R rows, of B streams and H heads."""

    batch: int
    heads: int

    def of_tokens(self, x: Tensor, layout: ChunkLayout) -> Tensor:
        """``[B, T, H, D]`` or ``[B, T, H]`` to ``[N, R, C, D]``, D = 1 of the latter."""
        chunks = layout.split(x.flatten(2), self.heads)  # [B, H, N, C, D]
        return chunks.permute(2, 0, 1, 3, 4).flatten(1, 2)

    def of_heads(self, x: Tensor) -> Tensor:
        """``[H, D]`` to ``[R, 1, D]``."""
        return x.expand(self.batch, -1, -1).flatten(0, 1)[:, None]

    def of_mask(self, mask: Tensor) -> Tensor:
        """``[B or 1, C, 1]`` to ``[R, C, 1]``."""
        return mask.expand(self.batch, -1, -1).repeat_interleave(self.heads, 0)

    def restore(self, x: Tensor) -> Tensor:
        """``[R, any, any]`` to ``[B, H, any, any]``."""
        return x.unflatten(0, (self.batch, self.heads))


def _applied(
    layout: ChunkLayout, after: Tensor, applied: Tensor, rows: _Rows, dtype: torch.dtype
) -> list[Tensor | None]:
    """Of each chunk ``[R, 1, 1]``, 1 where its update is applied, else 0; None where it ends in no row."""
    size = layout.chunk_size
    ends: list[Tensor | None] = []
    for n, row in enumerate(applied.unbind(1)):
        if layout.offset is None:
            ends.append(rows.of_mask(row[:, None, None]).to(dtype) if (n + 1) * size <= layout.length else None)
        else:
            ends.append(rows.of_mask((row & (after >= (n + 1) * size))[:, None, None]).to(dtype))
    return ends


def _stops(layout: ChunkLayout, after: Tensor, rows: _Rows) -> list[Tensor | None]:
    """Of each chunk ``[R, 1, 1]`` bool, the rows whose call ends in it, unfinished; None where there is none."""
    size = layout.chunk_size
    stops: list[Tensor | None] = []
    for n in range(layout.num_chunks):
        if (n + 1) * size <= layout.length:  # wherever a row began, an earlier chunk ends in this call
            stops.append(None)
        elif layout.offset is None:
            stops.append(rows.of_mask(torch.ones_like(after, dtype=torch.bool)[:, None, None]))
        else:
            stops.append(rows.of_mask(((after >= n * size) & (after < (n + 1) * size))[:, None, None]))
    return stops


def _in_groups(plan: _Plan, given: _Arguments, together: int | None) -> tuple[Tensor, tuple[Tensors, ...]]:
    """u_{L-1} ``[N, R, C, D]``, and the weights, biases, inputs and gradients after the last chunk."""
    count, layers = given.both.shape[0], plan.layers
    recompute = together is not None
    parts = [part.split(together or count) for part in (given.both, given.bias, given.rate, given.affinity)]
    now: Tensors = (*given.weights, *given.biases, *given.inputs, *given.gradients)
    fixed = given.gamma, given.mask, given.step
    outputs = []
    for first, tokens in zip(range(0, count, together or count), zip(*parts, strict=True), strict=True):
        last = first + tokens[0].shape[0]
        group = _Plan(plan.eps, first, last, plan.applied, plan.stops, plan.slots, layers, recompute)
        found = _Group.apply(group, *tokens, *fixed, *now, *given.earlier_inputs, *given.earlier_gradients)
        output, *after = found
        outputs.append(output)
        now = tuple(after)
    ends = (layers, 2 * layers, 3 * layers - 1)
    states = (now[: ends[0]], now[ends[0] : ends[1]], now[ends[1] : ends[2]], now[ends[2] :])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), states


def _unfinished(
    layout: ChunkLayout, after: Tensor, rows: _Rows, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> ChunkMemory:
    """The unfinished chunk: keys from those of all chunks ``inputs[0] [N, R, C, D]``; no slot ahead holds anything."""
    size, k = layout.chunk_size, inputs[0]
    last = torch.zeros_like(k[0])
    for n, stops in enumerate(_stops(layout, after, rows)):
        if stops is not None:
            last = torch.where(stops, k[n], last)
    held = torch.arange(size, device=after.device) < (after % size)[:, None]  # [C] and [B, 1] -> [B, C]
    held = rows.of_mask(held[..., None])
    a = tuple(rows.restore(torch.where(held, each, 0)) for each in (last, *inputs[1:]))
    return ChunkMemory(a, tuple(map(rows.restore, gradients)))
