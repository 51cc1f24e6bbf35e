"""The backward pass of a chunk of the inner loop, written out: that of the lines in ``chunk_passes``, in reverse.

It adds to the gradients of the fast weights in place. torch's own would make a tensor of their size for each product.

Shape legend: R = B H rows, each a stream and head; C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.plugins.hybrid.chunk_passes import (
    ChunkTokens,
    ChunkValues,
    Earlier,
    Shared,
    affinity_of,
    gelu,
    gelu_backward,
    gelu_second,
    memory_of,
    norm_backward,
)


@dataclass
class TokenGradients:
    """The gradients of a chunk's ``ChunkTokens``, and what becomes the gradients of what is shared.

    Attributes:
        gamma: ``[R, C, D]``, summed over C by the caller.
        products: of each layer, x a^T + 1 times the gradient of M times it, ``[R, C, C]``; summed over R by the caller.
        step: ``[R, 1, 1]``, of the update's factor.
        earlier_inputs, earlier_gradients: as in ``Earlier``; empty where there is none.
    """

    both: Tensor
    bias: Tensor
    rate: Tensor
    affinity: Tensor
    gamma: Tensor
    products: list[Tensor]
    step: Tensor | None
    earlier_inputs: list[Tensor]
    earlier_gradients: list[Tensor]


@dataclass
class Upstream:
    """Gradients that come from behind a chunk, and are added to in place.

    Attributes:
        output: ``[R, C, D]``, of u_{L-1}. weights, biases: of the fast weights after the chunk; then of those before.
        inputs: of a_i of layers 1 and up, gradients: of g_i, where the call ends in this chunk; else None.
    """

    output: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    inputs: list[Tensor] | None = None
    gradients: list[Tensor] | None = None


def backward(
    tokens: ChunkTokens,
    values: ChunkValues,
    weights: Sequence[Tensor],
    shared: Shared,
    earlier: Earlier | None,
    factor: Tensor | None,
    upstream: Upstream,
) -> TokenGradients:
    """The backward pass of ``key_and_query_pass`` and, where ``factor [R, 1, 1]`` is given, of ``update``.

    ``weights`` are those of the chunk's start.
    """
    layers = len(weights)
    inputs, gradients = memory_of(tokens, values, earlier)
    own_inputs = inputs if earlier is None else memory_of(tokens, values, None)[0]
    to_inputs: list[Tensor | None] = [None] * layers
    to_gradients: list[Tensor | None] = [None] * layers
    if upstream.inputs is not None and upstream.gradients is not None:
        to_inputs[1:], to_gradients[:] = upstream.inputs, upstream.gradients
    step = None
    if factor is not None:
        step = _update_backward(inputs, gradients, factor, upstream, to_inputs, to_gradients)
    queries, of_queries, of_affinity, products = _query_backward(
        tokens, values, weights, shared, inputs, gradients, upstream, to_inputs, to_gradients
    )
    of_key, of_inputs = to_inputs[0], [each for each in to_inputs[1:] if each is not None]
    of_gradients = [each for each in to_gradients if each is not None]
    of_earlier: list[list[Tensor]] = [[], []]
    if earlier is not None:
        of_earlier = [[torch.where(earlier.slots, t, 0) for t in part] for part in (of_inputs, of_gradients)]
        of_inputs = [each.masked_fill(earlier.slots, 0) for each in of_inputs]
        of_gradients = [each.masked_fill(earlier.slots, 0) for each in of_gradients]
    of_products = _gradient_backward(values, weights, of_gradients)
    of_z, loss = _loss_backward(tokens, values, shared, of_gradients[-1])
    of_outputs = [*(second for second, _ in of_products), of_z]
    for i in range(layers - 1, 0, -1):  # through o_i = a_i W_i + b_i, then gelu
        of_input = of_inputs[i - 1].baddbmm_(of_outputs[i], weights[i].mT)
        of_outputs[i - 1] = of_outputs[i - 1].add_(gelu_backward(of_input, values.outputs[i - 1]))
        # x_i, a_i and the second use of W_i, in g_i W_i^T: [R, 3 C, in] and [R, 3 C, out]
        left = torch.cat([queries[i - 1], own_inputs[i], of_products[i - 1][1]], 1)
        right = torch.cat([of_queries[i], of_outputs[i], values.gradients[i]], 1)
        upstream.weights[i].baddbmm_(left.mT, right)
        upstream.biases[i].add_(of_queries[i].sum(1, keepdim=True)).add_(of_outputs[i].sum(1, keepdim=True))
    both = torch.cat([of_outputs[0], of_queries[0]], 1)  # [R, 2 C, out]
    upstream.weights[0].baddbmm_(tokens.both.mT, both)
    upstream.biases[0].add_(both.sum(1, keepdim=True))
    of_both = torch.bmm(both, weights[0].mT)  # [R, 2 C, D]
    if of_key is not None:
        of_both[:, : of_key.shape[1]] += of_key
    return TokenGradients(of_both, *loss[:2], of_affinity, loss[2], products, step, *of_earlier)


def _update_backward(
    inputs: list[Tensor],
    gradients: list[Tensor],
    factor: Tensor,
    upstream: Upstream,
    to_inputs: list[Tensor | None],
    to_gradients: list[Tensor | None],
) -> Tensor:
    """Gradients of a_i and g_i through the update, put into the lists; ``[R, 1, 1]``, that of the factor."""
    step = torch.zeros_like(factor)
    for i, (a, g) in enumerate(zip(inputs, gradients, strict=True)):
        of_scaled = torch.baddbmm(upstream.biases[i], a, upstream.weights[i])  # [R, C, out]
        step += torch.linalg.vecdot(of_scaled.flatten(1), g.flatten(1))[:, None, None]  # [R] -> [R, 1, 1]
        of_input = torch.bmm(g * factor, upstream.weights[i].mT)  # [R, C, in]
        to_inputs[i] = _plus(to_inputs[i], of_input)
        to_gradients[i] = _plus(to_gradients[i], of_scaled.mul_(factor))
    return step


def _plus(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else other.add_(one)


def _query_backward(
    tokens: ChunkTokens,
    values: ChunkValues,
    weights: Sequence[Tensor],
    shared: Shared,
    inputs: list[Tensor],
    gradients: list[Tensor],
    upstream: Upstream,
    to_inputs: list[Tensor | None],
    to_gradients: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """x_i of layers 1 and up, the gradients of u_i, of the affinity of layer 0, and the ``products`` of the others.

    Those of a_i (layers 1 and up) and g_i are added in the lists.
    """
    of_queries = [upstream.output]
    queries: list[Tensor] = []
    products: list[Tensor] = []
    for i in range(len(weights) - 1, 0, -1):
        x = gelu(values.queries[i - 1])
        of_affinity = torch.bmm(of_queries[0], gradients[i].mT)  # [R, C, out] and [R, out, C] -> [R, C, C]
        product = torch.bmm(x, inputs[i].mT)  # [R, C, C]
        to_gradients[i] = _add_product(to_gradients[i], affinity_of(product, shared.mask).mT, of_queries[0])
        products.append(product.add_(1).mul_(of_affinity))
        of_affinity *= shared.mask
        to_inputs[i] = _add_product(to_inputs[i], of_affinity.mT, x)
        of_input = torch.bmm(of_queries[0], weights[i].mT).baddbmm_(of_affinity, inputs[i])  # [R, C, in]
        queries.insert(0, x)
        of_queries.insert(0, gelu_backward(of_input, values.queries[i - 1]))
    # The products with q and k are made for all chunks at once.
    of_affinity = torch.bmm(of_queries[0], gradients[0].mT)
    to_gradients[0] = _add_product(to_gradients[0], tokens.affinity.mT, of_queries[0])
    return queries, of_queries, of_affinity, products


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _gradient_backward(
    values: ChunkValues, weights: Sequence[Tensor], of_gradients: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Through g_{i-1} = gelu'(o_{i-1}) * (g_i W_i^T), of layers 1 and up: the gradients of o_{i-1} and of the product.

    Those of g_i are added in the list.
    """
    found = []
    for i in range(1, len(weights)):
        output, of_gradient = values.outputs[i - 1], of_gradients[i - 1]
        of_product = gelu_backward(of_gradient, output)
        of_gradients[i].baddbmm_(of_product, weights[i])
        found.append((gelu_second(output).mul_(values.products[i - 1]).mul_(of_gradient), of_product))
    return found


def _loss_backward(
    tokens: ChunkTokens, values: ChunkValues, shared: Shared, upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The gradient of z through g_{L-1}, ``[R, C, D]``; those of ``tokens.bias``, ``tokens.rate``, gamma (by token).

    With n the normalized z, r = rstd, e = rate * (gamma n + bias) and m a mean over D, g = r (e - m(e) - n m(e n)).
    For an upstream G: de = r (G - m(G) - n m(G n)), dn = -r (G m(e n) + e m(G n)) + gamma * rate * de, and
    dz = r (dn - m(dn) - n m(dn n)) - r n m(G g).
    """
    z, mean, rstd, gradient = values.outputs[-1], values.mean, values.rstd, values.gradients[-1]
    normal = (z - mean).mul_(rstd)
    error = torch.addcmul(tokens.bias, normal, shared.gamma)
    of_error = norm_backward(upstream, z, mean, rstd)
    of_rate = of_error * error
    of_bias = of_error.mul_(tokens.rate)  # of gamma n + bias
    error.mul_(tokens.rate)
    by_width = rstd / -z.shape[-1]
    shared_error, shared_upstream, moved = (
        torch.linalg.vecdot(a, b)[..., None].mul_(by_width)  # [R, C] -> [R, C, 1]
        for a, b in ((error, normal), (upstream, normal), (upstream, gradient))
    )
    of_normal = (of_bias * shared.gamma).addcmul_(upstream, shared_error).addcmul_(error, shared_upstream)
    of_z = norm_backward(of_normal, z, mean, rstd).addcmul_(normal, moved)
    return of_z, (of_bias, of_rate, normal.mul_(of_bias))
