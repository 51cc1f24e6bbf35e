"""Groups of chunks as one function with a gradient of its own: all chunks of a call, or an activation checkpoint.

Between the passes it keeps a group's arguments, what each of its chunks computed, and the fast weights at the start of
some chunks; the others are made again. A checkpoint keeps its arguments alone.

Shape legend: R = B H rows, N chunks of the group, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.chunk_backward import Upstream, backward
from moshi_ttt.plugins.hybrid.chunk_passes import (
    ChunkTokens,
    ChunkValues,
    Earlier,
    Shared,
    key_and_query_pass,
    memory_of,
    update,
)

Tensors = tuple[Tensor, ...]


@dataclass
class ChunkGroup:
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

    def earlier(self, n: int, parts: Arguments) -> Earlier | None:
        if n or self.slots is None:
            return None
        return Earlier(self.slots, parts.earlier_inputs, parts.earlier_gradients)


@dataclass
class Arguments:
    """The tensors of a group: of its tokens ``[N, R, C, any]``, shared ones, and of what it starts from, by layer.

    Attributes:
        both: keys and then queries, ``[N, R, 2 C, D]``. bias: beta - target, ``[N, R, C, D]``. lr: ``[N, R, C, 1]``.
        gamma, beta: ``[N, R, 1, D]``. mask: M, ``[N, C, C]``. step: ``[N, 1, 1, 1]``, -token_scale[-1]. The chunks
            share them, and are given views, so that their gradients are summed in one order, whatever a group is.
        inputs, gradients: of the unfinished chunk, a_i of layers 1 and up, and g_i.
    """

    both: Tensor
    bias: Tensor
    lr: Tensor
    gamma: Tensor
    beta: Tensor
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
            self.both, self.bias, self.lr, self.gamma, self.beta, self.mask, self.step, *self.weights, *self.biases,
            *self.inputs, *self.gradients, *self.earlier_inputs, *self.earlier_gradients,
        )  # fmt: skip

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> Arguments:
        """The inverse of ``tensors``."""
        rest = iter(tensors)
        both, bias, lr, gamma, beta, mask, step = islice(rest, 7)
        weights, biases, inputs, gradients, *earlier = (
            tuple(islice(rest, count)) for count in (layers, layers, layers - 1, layers, layers - 1, layers)
        )
        return cls(both, bias, lr, gamma, beta, mask, step, weights, biases, inputs, gradients, *earlier)

    def products(self) -> Tensor:
        """q k^T of each chunk, ``[N, R, C, C]``."""
        k, q = self.both.flatten(0, 1).chunk(2, 1)  # [N R, 2 C, D] -> twice [N R, C, D]
        products: Tensor = torch.bmm(q, k.mT).unflatten(0, self.both.shape[:2])
        return products

    def chunks(self) -> list[ChunkTokens]:
        """What each chunk's tokens bring; computed for all of them at once."""
        rate, affinity = self.lr * self.gamma, torch.addcmul(self.mask[:, None], self.products(), self.mask[:, None])
        return [ChunkTokens(*parts) for parts in zip(self.both, self.bias, rate, affinity, strict=True)]


@dataclass
class Kept:
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
        return max(1, math.isqrt(chunks))

    def tensors(self) -> Tensors:
        parts = [*(values.tensors() for values in self.values), *self.weights]
        return tuple(tensor for part in parts for tensor in part)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], chunks: int, layers: int) -> Kept:
        """The inverse of ``tensors``."""
        each = 4 * layers + 1
        values = [ChunkValues.of(tensors[n * each : (n + 1) * each], layers) for n in range(chunks)]
        rest = tensors[chunks * each :]
        return cls(values, [tuple(rest[i : i + layers]) for i in range(0, len(rest), layers)])


def _forward(plan: ChunkGroup, given: Arguments, keep: bool) -> tuple[Tensor, Tensors, Kept]:
    """u_{L-1} of all chunks ``[N, R, C, D]``; the fast weights and the unfinished chunk after them; what is kept."""
    chunks = given.chunks()
    shared = Shared(given.gamma[0], given.mask[0], plan.eps)
    biases, inputs, gradients = given.biases, given.inputs, given.gradients
    weights, mine = given.weights, False  # whether they may be written to
    output = torch.empty_like(given.bias)
    kept = Kept([], [])
    stride = kept.stride(plan.last - plan.first)
    for n in range(plan.first, plan.last):
        at = n - plan.first
        if keep and at % stride == 0:
            kept.weights.append(weights)
            mine = False
        values, a, g = key_and_query_pass(chunks[at], weights, biases, shared, plan.earlier(n, given))
        output[at] = values.queries[-1]
        if keep:
            kept.values.append(replace(values, queries=(*values.queries[:-1], output[at])))
        if (stops := plan.stops[n]) is not None:
            inputs = tuple(torch.where(stops, new, old) for new, old in zip(a[1:], inputs, strict=True))
            gradients = tuple(torch.where(stops, new, old) for new, old in zip(g, gradients, strict=True))
        if (applied := plan.applied[n]) is not None:
            into = weights if mine else tuple(torch.empty_like(weight) for weight in weights)
            added = update(weights, a, g, applied * given.step[at], into)
            weights, mine = into, True
            biases = tuple(bias + more for bias, more in zip(biases, added, strict=True))
    return output, (*weights, *biases, *inputs, *gradients), kept


def _weights_again(
    plan: ChunkGroup, given: Arguments, chunks: list[ChunkTokens], kept: Kept
) -> Iterator[tuple[int, Tensors]]:
    """Each chunk of the group and its fast weights, the last chunk first."""
    count = plan.last - plan.first
    stride = kept.stride(count)
    buffers = [tuple(torch.empty_like(weight) for weight in given.weights) for _ in range(min(stride, count) - 1)]
    for begin in range((count - 1) // stride * stride, -1, -stride):
        found = [kept.weights[begin // stride]]
        places = range(begin, min(begin + stride, count) - 1)  # the last part may be shorter than the others
        for at, buffer in zip(places, buffers[: len(places)], strict=True):
            n, values = plan.first + at, kept.values[at]
            applied = plan.applied[n]
            assert applied is not None  # only the chunks at the end of a call can be without an update
            update(found[-1], *memory_of(chunks[at], values, plan.earlier(n, given)), applied * given.step[at], buffer)
            found.append(buffer)
        for at in range(begin + len(found) - 1, begin - 1, -1):
            yield plan.first + at, found[at - begin]


def _normalized(plan: ChunkGroup, given: Arguments, output: Tensor) -> Tensor:
    """gamma LN(u_{L-1}) + beta, ``[N, R, C, D]``."""
    normal = torch.nn.functional.layer_norm(output, output.shape[-1:], eps=plan.eps)
    return torch.addcmul(given.beta, normal, given.gamma)


class _Group(torch.autograd.Function):
    """Chunks ``plan.first`` to ``plan.last - 1``: LN(f(q; W_n)) ``[N, R, C, D]``, and what they leave."""

    @staticmethod
    def forward(ctx: Any, plan: ChunkGroup, *tensors: Tensor) -> Tensors:
        given = Arguments.of(tensors, plan.layers)
        output, after, kept = _forward(plan, given, keep=not plan.recompute)
        ctx.plan, ctx.arguments = plan, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(() if plan.recompute else (output, *kept.tensors())))
        # What passed through unchanged is a view of it: an output that is an input would be taken for written to.
        after = tuple(each.view_as(each) if any(each is old for old in tensors) else each for each in after)
        return _normalized(plan, given, output), *after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: ChunkGroup = ctx.plan
        count: int = ctx.arguments
        if all(each is None for each in upstream):
            return (None,) * (1 + count)
        tensors = ctx.saved_tensors
        given = Arguments.of(tensors[:count], plan.layers)
        results = (given.bias, *given.weights, *given.biases, *given.inputs, *given.gradients)  # of their shapes
        of_output, *of_after = (
            torch.zeros_like(result) if each is None else each for each, result in zip(upstream, results, strict=True)
        )
        if plan.recompute:
            output, _, kept = _forward(plan, given, keep=True)
        else:
            output, *rest = tensors[count:]
            kept = Kept.of(rest, plan.last - plan.first, plan.layers)
        gradients = _backward(plan, given, output, kept, of_output, of_after)
        return (None, *gradients.tensors())


def _norm_backward(
    plan: ChunkGroup, given: Arguments, output: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u_{L-1} ``[N, R, C, D]``, gamma and beta ``[N, R, 1, D]`` through gamma LN(u_{L-1}) + beta."""
    width = output.shape[-1:]
    normal, mean, rstd = torch.native_layer_norm(output, width, None, None, plan.eps)
    of_beta, of_gamma = (each.sum(2, keepdim=True) for each in (upstream, normal.mul_(upstream)))
    mask = [True, False, False]
    of_normal = upstream * given.gamma
    backward_of = torch.ops.aten.native_layer_norm_backward
    return backward_of(of_normal, output, width, mean, rstd, None, None, mask)[0], of_gamma, of_beta


def _backward(
    plan: ChunkGroup, given: Arguments, output: Tensor, kept: Kept, of_output: Tensor, of_after: Sequence[Tensor]
) -> Arguments:
    """The gradients of ``given``."""
    shared, layers, chunks = Shared(given.gamma[0], given.mask[0], plan.eps), plan.layers, given.chunks()
    ends = (layers, 2 * layers, 3 * layers - 1)
    weights = [each.clone(memory_format=torch.contiguous_format) for each in of_after[: ends[0]]]
    biases = [each.clone(memory_format=torch.contiguous_format) for each in of_after[ends[0] : ends[1]]]
    inputs, gradients = list(of_after[ends[1] : ends[2]]), list(of_after[ends[2] :])
    of_output, gamma, beta = _norm_backward(plan, given, output, of_output)
    of_both, of_bias = torch.empty_like(given.both), torch.empty_like(given.bias)
    of_rate, of_affinity = (
        torch.empty_like(given.bias),
        given.bias.new_empty(*given.bias.shape[:3], given.mask.shape[1]),
    )
    of_tokens = (of_both, of_bias, of_rate, of_affinity)
    mask, step = (each.new_zeros(each.shape) for each in (given.mask, given.step))
    earlier: list[list[Tensor]] = [
        list(map(torch.zeros_like, p)) for p in (given.earlier_inputs, given.earlier_gradients)
    ]
    for n, fast in _weights_again(plan, given, chunks, kept):
        at, stops, applied = n - plan.first, plan.stops[n], plan.applied[n]
        upstream = Upstream(of_output[at], weights, biases)
        if stops is not None:
            upstream.inputs = [torch.where(stops, each, 0) for each in inputs]
            upstream.gradients = [torch.where(stops, each, 0) for each in gradients]
            inputs = [torch.where(stops, 0, each) for each in inputs]
            gradients = [torch.where(stops, 0, each) for each in gradients]
        factor = None if applied is None else applied * given.step[at]
        found = backward(chunks[at], kept.values[at], fast, shared, plan.earlier(n, given), factor, upstream)
        for whole, part in zip(of_tokens, (found.both, found.bias, found.rate, found.affinity), strict=True):
            whole[at] = part
        gamma[at] += found.gamma.sum(1, keepdim=True)  # [R, C, D] -> [R, 1, D]
        for product in found.products:
            mask[at] += product.sum(0)  # [R, C, C] -> [C, C]
        if applied is not None and found.step is not None:
            step[at] = (applied * found.step).sum()
        if plan.earlier(n, given) is not None:
            earlier = [found.earlier_inputs, found.earlier_gradients]
    # What was made for all chunks at once: rate = lr gamma, and M (q k^T + 1).
    of_lr = torch.linalg.vecdot(of_rate, given.gamma)[..., None]  # [N, R, C] -> [N, R, C, 1]
    gamma += of_rate.mul_(given.lr).sum(2, keepdim=True)  # [N, R, C, D] -> [N, R, 1, D]
    mask += given.products().add_(1).mul_(of_affinity).sum(1)  # [N, R, C, C] -> [N, C, C]
    of_affinity *= given.mask[:, None]
    k, q = given.both.flatten(0, 1).chunk(2, 1)  # [N R, 2 C, D] -> twice [N R, C, D]
    of_k, of_q = of_both.flatten(0, 1).chunk(2, 1)
    of_q.baddbmm_(of_affinity.flatten(0, 1), k)  # [N R, C, C] and [N R, C, D]
    of_k.baddbmm_(of_affinity.flatten(0, 1).mT, q)
    return Arguments(
        of_both,
        of_bias, of_lr, gamma, beta, mask, step, tuple(weights), tuple(biases), tuple(inputs), tuple(gradients),
        tuple(earlier[0]), tuple(earlier[1]),
    )  # fmt: skip


def in_groups(plan: ChunkGroup, given: Arguments, together: int | None) -> tuple[Tensor, tuple[Tensors, ...]]:
    """LN(f(q; W_n)) ``[N, R, C, D]``, and the weights, biases, inputs and gradients after the last chunk.

    ``given`` are those of chunk ``plan.first`` of the call and the chunks after it.
    """
    count, layers = given.both.shape[0], plan.layers
    recompute = together is not None
    of_chunks = (given.both, given.bias, given.lr, given.gamma, given.beta, given.mask, given.step)
    parts = [part.split(together or count) for part in of_chunks]
    now: Tensors = (*given.weights, *given.biases, *given.inputs, *given.gradients)
    outputs = []
    for first, tokens in zip(range(0, count, together or count), zip(*parts, strict=True), strict=True):
        begin = plan.first + first
        last = begin + tokens[0].shape[0]
        group = ChunkGroup(plan.eps, begin, last, plan.applied, plan.stops, plan.slots, layers, recompute)
        arguments = (*tokens, *now, *given.earlier_inputs, *given.earlier_gradients)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
            output, *after = _Group.apply(group, *arguments)  # type: ignore[no-untyped-call]
        else:
            part = Arguments.of(arguments, layers)
            output, after, _ = _forward(group, part, keep=False)
            output = _normalized(group, part, output)
        outputs.append(output)
        now = tuple(after)
    ends = (layers, 2 * layers, 3 * layers - 1)
    states = (now[: ends[0]], now[ends[0] : ends[1]], now[ends[1] : ends[2]], now[ends[2] :])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), states
