"""One chunk of the inner loop, forward and backward, with the backward pass written out.

``inner_loop`` says what is computed; this is the published form of it: the inner LayerNorm, one step a chunk, no
momentum. With a_i the input of layer i for the chunk's keys, o_i = a_i W_i + b_i its output, g_i the gradient of the
inner loss there, x_i and u_i the same for the queries, and M = -token_scale * mask:

    g_{L-1} = LayerNorm'(z) (gamma * lr * (gamma * n(z) + beta - target))     with z = o_{L-1}, n its LayerNorm
    g_{i-1} = gelu'(o_{i-1}) * (g_i W_i^T)
    u_i     = x_i W_i + b_i + (M * (x_i a_i^T + 1)) g_i
    W_i    <- W_i - token_scale[-1] * a_i^T g_i,    b_i <- b_i - token_scale[-1] * sum g_i

The backward pass is that of these lines, in reverse. It adds to the gradients of the fast weights in place, which is
why it is written out: torch's own would make a tensor of their size for each product.

Shape legend: R = B H rows, each a stream and head; C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

_CUBIC, _ROOT = 0.044715, math.sqrt(2 / math.pi)
"""Of the tanh form of gelu: x / 2 * (1 + tanh(_ROOT * (x + _CUBIC * x^3)))."""


@dataclass
class ChunkTokens:
    """What a chunk's tokens bring, whatever the fast weights are.

    Attributes:
        both: ``[R, 2 C, D]``, the keys and then the queries: the first layer takes them together.
        bias: ``[R, C, D]``, beta - target.
        rate: ``[R, C, D]``, gamma * lr; zero in a slot that holds no token.
        affinity: ``[R, C, C]``, M * (q k^T + 1).
    """

    both: Tensor
    bias: Tensor
    rate: Tensor
    affinity: Tensor

    @property
    def k(self) -> Tensor:
        """``[R, C, D]``."""
        return self.both[:, : self.bias.shape[1]]


@dataclass
class Shared:
    """What all chunks of a call share: ``gamma [R, 1, D]``, ``mask [C, C]`` (M), and the eps of the LayerNorm."""

    gamma: Tensor
    mask: Tensor
    eps: float


@dataclass
class Earlier:
    """The slots of a chunk that hold tokens from before the call.

    Attributes:
        slots: ``[R, C, 1]`` bool.
        inputs: a_i of layers 1 and up. gradients: g_i of each layer.
    """

    slots: Tensor
    inputs: Sequence[Tensor]
    gradients: Sequence[Tensor]


@dataclass
class ChunkValues:
    """What the backward pass of a chunk needs of its forward pass, by layer.

    Attributes:
        outputs: o_i. gradients: g_i of the call's own tokens.
        queries: u_i; the last one is what the chunk gives.
        products: g_i W_i^T of layers 1 and up.
        mean, rstd: ``[R, C, 1]`` of z.
    """

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    products: tuple[Tensor, ...]
    mean: Tensor
    rstd: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.outputs, *self.gradients, *self.queries, *self.products, self.mean, self.rstd

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layers: int) -> ChunkValues:
        """The inverse of ``tensors``."""
        rest = iter(tensors)
        counts = (layers, layers, layers, layers - 1)
        return cls(*(tuple(islice(rest, count)) for count in counts), *rest)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward(upstream: Tensor, x: Tensor) -> Tensor:
    gradient: Tensor = torch.ops.aten.gelu_backward(upstream, x, approximate="tanh")
    return gradient


def gelu_second(x: Tensor) -> Tensor:
    """gelu''(x): with s = x^2, t the tanh and p = _ROOT (1 + 3 _CUBIC s), (1 - t^2) (p + 3 _ROOT _CUBIC s - x t p^2)."""
    square = x * x
    t = (square * (_ROOT * _CUBIC)).add_(_ROOT).mul_(x).tanh_()
    p = (square * (3 * _ROOT * _CUBIC)).add_(_ROOT)
    inner = square.mul_(6 * _ROOT * _CUBIC).add_(_ROOT).sub_(p.mul_(p).mul_(t).mul_(x))
    return inner.addcmul_(inner, t.mul_(t), value=-1)


def merged(own: Sequence[Tensor], earlier: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
    """``earlier`` in its ``slots [R, C, 1]``, ``own`` elsewhere; both ``[R, C, any]``."""
    return [torch.where(slots, old, new) for old, new in zip(earlier, own, strict=True)]


def key_and_query_pass(
    tokens: ChunkTokens, weights: Sequence[Tensor], biases: Sequence[Tensor], shared: Shared, earlier: Earlier | None
) -> tuple[ChunkValues, list[Tensor], list[Tensor]]:
    """A chunk's values, and a_i and g_i with those of ``earlier``; its output is ``values.queries[-1]``."""
    layers, size = len(weights), tokens.bias.shape[1]
    both = torch.baddbmm(biases[0], tokens.both, weights[0])  # [R, 2 C, D] -> [R, 2 C, out]
    inputs, outputs = [tokens.k], [both[:, :size]]
    for i in range(1, layers):
        inputs.append(gelu(outputs[-1]))
        outputs.append(torch.baddbmm(biases[i], inputs[-1], weights[i]))
    z = outputs[-1]
    normal, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, shared.eps)
    error = torch.addcmul(tokens.bias, normal, shared.gamma).mul_(tokens.rate)
    own, products = [_norm_backward(error, z, mean, rstd)], []
    for i in range(layers - 1, 0, -1):
        products.insert(0, torch.bmm(own[0], weights[i].mT))
        own.insert(0, gelu_backward(products[0], outputs[i - 1]))
    gradients = own
    if earlier is not None:
        inputs[1:] = merged(inputs[1:], earlier.inputs, earlier.slots)
        gradients = merged(own, earlier.gradients, earlier.slots)
    queries = [both[:, size:].baddbmm_(tokens.affinity, gradients[0])]
    for i in range(1, layers):
        x = gelu(queries[-1])
        # [R, C, in] and [R, in, C] -> [R, C, C]
        affinity = _affinity(torch.bmm(x, inputs[i].mT), shared.mask)
        queries.append(torch.baddbmm(biases[i], x, weights[i]).baddbmm_(affinity, gradients[i]))
    values = ChunkValues(tuple(outputs), tuple(own), tuple(queries), tuple(products), mean, rstd)
    return values, inputs, gradients


def memory_of(
    tokens: ChunkTokens, values: ChunkValues, earlier: Earlier | None
) -> tuple[list[Tensor], list[Tensor]]:
    """a_i and g_i again, with those of ``earlier``."""
    inputs, gradients = [tokens.k, *map(gelu, values.outputs[:-1])], list(values.gradients)
    if earlier is not None:
        inputs[1:] = merged(inputs[1:], earlier.inputs, earlier.slots)
        gradients = merged(gradients, earlier.gradients, earlier.slots)
    return inputs, gradients


def _affinity(products: Tensor, mask: Tensor) -> Tensor:
    """M * (x a^T + 1), ``[R, C, C]``, of ``products``, x a^T."""
    return torch.addcmul(mask, products, mask)


def _norm_backward(upstream: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    mask = [True, False, False]
    gradient: Tensor = torch.ops.aten.native_layer_norm_backward(
        upstream, z, z.shape[-1:], mean, rstd, None, None, mask
    )[0]
    return gradient


def update(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factor: Tensor,
    into: Sequence[Tensor],
) -> list[Tensor]:
    """Write the fast weights after the chunk ``into`` tensors, which may be ``weights``; what the biases get.

    ``factor [R, 1, 1]``: -token_scale[-1] in rows that are updated, else zero.
    """
    scaled = [gradient * factor for gradient in gradients]
    for weight, a, g, after in zip(weights, inputs, scaled, into, strict=True):
        torch.baddbmm(weight, a.mT, g, out=after)
    return [g.sum(1, keepdim=True) for g in scaled]


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
    to_inputs: list[Tensor | None] = [None, *(upstream.inputs or [None] * (layers - 1))]
    to_gradients: list[Tensor | None] = [*(upstream.gradients or [None] * layers)]
    step = None
    if factor is not None:
        step = _update_backward(inputs, gradients, factor, upstream, to_inputs, to_gradients)
    queries, of_queries, of_affinity, products = _query_backward(
        tokens, values, weights, shared, inputs, gradients, upstream, to_inputs, to_gradients
    )
    of_key, of_inputs = to_inputs[0], [each for each in to_inputs[1:] if each is not None]
    of_gradients = [each for each in to_gradients if each is not None]
    to_earlier: tuple[list[Tensor], list[Tensor]] = ([], [])
    if earlier is not None:
        to_earlier = tuple([torch.where(earlier.slots, t, 0) for t in part] for part in (of_inputs, of_gradients))
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
    return TokenGradients(of_both, *loss[:2], of_affinity, loss[2], products, step, *to_earlier)


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
    of_queries, queries, products = [upstream.output], [], []
    for i in range(len(weights) - 1, 0, -1):
        x = gelu(values.queries[i - 1])
        of_affinity = torch.bmm(of_queries[0], gradients[i].mT)  # [R, C, out] and [R, out, C] -> [R, C, C]
        product = torch.bmm(x, inputs[i].mT)  # [R, C, C]
        to_gradients[i] = _add_product(to_gradients[i], _affinity(product, shared.mask).mT, of_queries[0])
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
    of_error = _norm_backward(upstream, z, mean, rstd)
    of_rate = of_error * error
    of_bias = of_error.mul_(tokens.rate)  # of gamma n + bias
    error.mul_(tokens.rate)
    by_width = rstd / -z.shape[-1]
    shared_error, shared_upstream, moved = (
        torch.linalg.vecdot(a, b)[..., None].mul_(by_width)  # [R, C] -> [R, C, 1]
        for a, b in ((error, normal), (upstream, normal), (upstream, gradient))
    )
    of_normal = (of_bias * shared.gamma).addcmul_(upstream, shared_error).addcmul_(error, shared_upstream)
    of_z = _norm_backward(of_normal, z, mean, rstd).addcmul_(normal, moved)
    return of_z, (of_bias, of_rate, normal.mul_(of_bias))
