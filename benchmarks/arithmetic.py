"""The least work of the inner loop, counted, and what this machine can do in the same time.

Counted are the multiplications and additions of matrix products, and the bytes that have to come from memory and go to
it. A call's products within a chunk have all of its pairs of tokens, as matrix products compute them; a causal form
needs half of them, 2 to 4 % of the operations of heads of 128 at chunk 16. LayerNorm, gelu and other operations on
single values are not counted: their number does not grow with the widths of a product. What a form computes a second
time is not counted either, so a form that recomputes has a smaller share.

Of a head, P is the number of weights of all layers, P' that of the layers after the first, and S the sum of the layers'
input and output widths. A chunk of C tokens costs, forward:

    keys through the network             2 C P
    gradients back through it            2 C P'
    queries through the network          2 C P
    queries with keys, and their sums    2 C C S     (x_i a_i^T, and that times g_i)
    the update at the chunk's end        2 C P
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

Clock = Callable[[], float]
PRODUCTS = (256, 512, 1024)
"""Sizes of the square matrices whose product is timed."""


@dataclass(frozen=True)
class Work:
    """The least that something costs.

    Attributes:
        operations: multiplications and additions of matrix products.
        num_bytes: read from memory and written to it.
    """

    operations: int
    num_bytes: int


def _weights(widths: Sequence[int]) -> tuple[int, int, int]:
    """P, P' and S of a head: see the module."""
    sizes = [a * b for a, b in pairwise(widths)]
    return sum(sizes), sum(sizes[1:]), sum(a + b for a, b in pairwise(widths))


def training_work(widths: Sequence[int], *, batch: int, heads: int, length: int, chunk: int, itemsize: int = 4) -> Work:
    """Forward and backward of a call from learned initial weights, with gradients of tokens and weights.

    The backward pass has two products for each of the forward pass, but for the last update, which no output sees.
    Its bytes are q, k, v and the rates, read in both passes, the output and its gradient, the gradients of the tokens;
    the initial weights, read in both passes, and their gradients. Fast weights stay in a cache.

    Args:
        widths: of the layers of a head's network, input and output included.
        length: T, whole chunks.

    Raises:
        ValueError: ``length`` is not a multiple of ``chunk``.
    """
    if length % chunk:
        raise ValueError(f"{length} tokens are no whole chunks of {chunk}. Give a multiple of {chunk}.")
    all_weights, later, sums = _weights(widths)
    forward = (length // chunk) * 2 * chunk * (3 * all_weights + later + chunk * sums)
    operations = batch * heads * (3 * forward - 2 * 2 * chunk * all_weights)
    tokens, rates = batch * length * heads * widths[0], batch * length * heads
    learned = heads * (all_weights + sum(widths[1:]))
    return Work(operations, itemsize * (11 * tokens + 3 * rates + 3 * learned))


def streaming_work(
    widths: Sequence[int], *, batch: int, heads: int, chunk: int, tokens: int, itemsize: int = 4
) -> Work:
    """``tokens`` streamed from a chunk's start, each of which sees the keys of its chunk up to its own.

    Its bytes are one read of the fast weights at each token, one write of them at each chunk's end, one write of each
    token's layer inputs and gradients, and one read of those of its chunk before it. The token itself is not counted.

    Args:
        widths: of the layers of a head's network, input and output included.
    """
    all_weights, later, sums = _weights(widths)
    stored = all_weights + sum(widths[1:])
    whole, rest = divmod(tokens, chunk)
    seen = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    operations = 2 * (tokens * (2 * all_weights + later) + whole * chunk * all_weights + seen * sums)
    moved = tokens * stored + whole * stored + seen * sums  # a token's own is written, the earlier ones are read
    return Work(batch * heads * operations, itemsize * batch * heads * moved)


@dataclass
class Machine:
    """What the machine can do on torch's threads, measured when it is first asked for.

    Attributes:
        clock: counts seconds, as for what is compared.
        seconds: of measuring each.
    """

    clock: Clock = time.perf_counter
    seconds: float = 0.3
    _products: float = 0.0
    _moved: dict[int, float] = field(default_factory=dict)

    def operations_per_second(self) -> float:
        """Of the fastest product of two square float32 matrices."""
        if not self._products:
            for size in PRODUCTS:
                a, b = torch.randn(2, size, size).unbind(0)
                out = torch.empty(size, size)
                rate = 2 * size**3 / self._least(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
                self._products = max(self._products, rate)
        return self._products

    def bytes_per_second(self, size: int) -> float:
        """Of reading or copying ``size`` bytes of memory again and again, whichever is faster: caches help small sizes.

        Sizes are rounded up to a power of two, from 64 KiB to 256 MiB.
        """
        size = 2 ** min(max((size - 1).bit_length(), 16), 28)
        if size not in self._moved:
            whole = torch.zeros(size // 4)
            rows, vector = whole.view(-1, 1024), torch.zeros(1024)
            first, second = whole.chunk(2)
            calls: tuple[Callable[[], Tensor], ...] = (
                lambda: rows @ vector, whole.sum, lambda: first.copy_(second)
            )  # fmt: skip
            self._moved[size] = max(size / self._least(call) for call in calls)
        return self._moved[size]

    def least_seconds(self, work: Work, size: int) -> float:
        """The time that no form of ``work`` can be below, while it goes through ``size`` bytes of memory."""
        return max(work.operations / self.operations_per_second(), work.num_bytes / self.bytes_per_second(size))

    def _least(self, call: Callable[[], object]) -> float:
        call()
        shortest, total = float("inf"), 0.0
        while total < self.seconds:
            began, repeats = self.clock(), 0
            while repeats < 3 or self.clock() - began < 1e-3:
                call()
                repeats += 1
            taken = self.clock() - began
            shortest, total = min(shortest, taken / repeats), total + taken
        return shortest
