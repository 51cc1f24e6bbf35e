"""One chunk of the inner loop, forward; ``chunk_backward`` is its backward pass, written out.

``inner_loop`` says what is computed; this is the published form of it: the inner LayerNorm, one step a chunk, no
momentum. With a_i the input of layer i for the chunk's keys, o_i = a_i W_i + b_i its output, g_i the gradient of the
inner loss there, x_i and u_i the same for the queries, and M = -token_scale * mask:

    g_{L-1} = LayerNorm'(z) (gamma * lr * (gamma * n(z) + beta - target))     with z = o_{L-1}, n its LayerNorm
    g_{i-1} = gelu'(o_{i-1}) * (g_i W_i^T)
    u_i     = x_i W_i + b_i + (M * (x_i a_i^T + 1)) g_i
    W_i    <- W_i - token_scale[-1] * a_i^T g_i,    b_i <- b_i - token_scale[-1] * sum g_i

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
        outputs, gradients, queries, products = (tuple(islice(rest, count)) for count in counts)
        mean, rstd = rest
        return cls(outputs, gradients, queries, products, mean, rstd)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward(upstream: Tensor, x: Tensor) -> Tensor:
    gradient: Tensor = torch.ops.aten.gelu_backward(upstream, x, approximate="tanh")
    return gradient


def gelu_second(x: Tensor) -> Tensor:
    """gelu''(x): with s = x^2, t the tanh and p = _ROOT (1 + 3 _CUBIC s), (1 - t^2) (p + 3 _ROOT _CUBIC s - x t p^2).

    It is torch's ``gelu_backward`` of 1, differentiated.
    """
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
    own = [norm_backward(error, z, mean, rstd)]
    products: list[Tensor] = []
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
        affinity = affinity_of(torch.bmm(x, inputs[i].mT), shared.mask)
        queries.append(torch.baddbmm(biases[i], x, weights[i]).baddbmm_(affinity, gradients[i]))
    values = ChunkValues(tuple(outputs), tuple(own), tuple(queries), tuple(products), mean, rstd)
    return values, inputs, gradients


def memory_of(tokens: ChunkTokens, values: ChunkValues, earlier: Earlier | None) -> tuple[list[Tensor], list[Tensor]]:
    """a_i and g_i again, with those of ``earlier``."""
    inputs, gradients = [tokens.k, *map(gelu, values.outputs[:-1])], list(values.gradients)
    if earlier is not None:
        inputs[1:] = merged(inputs[1:], earlier.inputs, earlier.slots)
        gradients = merged(gradients, earlier.gradients, earlier.slots)
    return inputs, gradients


def affinity_of(products: Tensor, mask: Tensor) -> Tensor:
    """M * (x a^T + 1), ``[R, C, C]``, of ``products``, x a^T."""
    return torch.addcmul(mask, products, mask)


def norm_backward(upstream: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
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
