"""What the kernels of a streamed step share: vectors of one token, sums over slices, the loss's gradient, updates.

Everything is computed in float32, and every product is one of float32 on the CUDA cores: a step multiplies vectors by
matrices, and what takes time is to read the matrices. What is stored in a state is rounded to the state's dtype.

Shape legend: B rows, H heads, C tokens a chunk, D head width, F hidden width, P slices of S hidden units.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def numbers(at, inside):
    """What lies ``at`` pointers, in float32; zero where not ``inside``."""
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def vector(POINTER, index, SIZE):
    """Elements ``index`` of the ``SIZE`` at ``POINTER``, in float32; zero beyond them."""
    return tl.load(POINTER + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def vector_where(keep, POINTER, index, SIZE):
    """``vector``, and zero where not ``keep``, one bool or one for each element."""
    return tl.load(POINTER + index, mask=(index < SIZE) & keep, other=0.0).to(tl.float32)


@triton.jit
def row_now(NOW, OK, UPDATED, row, H, HEADS: tl.constexpr):
    """What a step does in a row: ``position``, whether the token is ``finite``, tokens of the chunk that are not.

    ``NOW [B, 2]`` has position and spoiled as they were before the step, ``OK [B, H]`` which heads are finite.
    ``HEADS``: the next power of two from H.
    """
    head = tl.arange(0, HEADS)
    finite = tl.min(tl.load(OK + row * H + head, mask=head < H, other=1), 0) != 0
    counts = tl.where(finite, 0, 1)
    if UPDATED is not None:
        counts = tl.where(tl.load(UPDATED + row) != 0, counts, 0)
    return tl.load(NOW + 2 * row), finite, tl.load(NOW + 2 * row + 1) + counts


@triton.jit
def sum_of_parts(PARTS, index, SIZE, SLICES: tl.constexpr, BP: tl.constexpr):
    """Elements ``index [n]`` of the sum over P of ``PARTS [P, SIZE]``. ``BP``: the next power of two from P."""
    part = tl.arange(0, BP)
    inside = (part < SLICES)[:, None] & (index < SIZE)[None, :]  # [P, n]
    return tl.sum(tl.load(PARTS + part[:, None] * SIZE + index[None, :], mask=inside, other=0.0), 0)


@triton.jit
def moments(z, inside, eps, D: tl.constexpr):
    """The mean of ``z [D]`` and one over its standard deviation."""
    mean = tl.sum(z, 0) / D
    centered = tl.where(inside, z - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)


@triton.jit
def output_gradient(z, target, weight, bias, inside, eps, D: tl.constexpr):
    """d/dz of 1/2 || LN(z) - target ||^2, ``[D]``, all arguments ``[D]`` and zero beyond it.

    Also what gives an element of it alone: the mean, r and two averages.
    """
    mean, r = moments(z, inside, eps, D)
    n = tl.where(inside, z - mean, 0.0) * r
    u = (n * weight + bias - target) * weight
    average, along = tl.sum(u, 0) / D, tl.sum(u * n, 0) / D
    return tl.where(inside, r * (u - average - n * along), 0.0), mean, r, average, along


@triton.jit
def add_next_parts(
    x, W, PART, unit, F: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A slice's part of x W, into ``PART [OUT]``: for ``x [S]`` and rows ``unit [S]`` of ``W [F, OUT]``."""
    for start in range(0, OUT, BO):
        out = start + tl.arange(0, BO)
        inside = (unit < F)[:, None] & (out < OUT)[None, :]  # [S, BO]
        w = numbers(W + unit[:, None] * OUT + out[None, :], inside)
        tl.store(PART + out, tl.sum(x[:, None] * w, 0), mask=out < OUT)


@triton.jit
def back_through(g, G, W, unit, F: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr, GIVEN: tl.constexpr):
    """Elements ``unit [S]`` of W g, for ``W [F, OUT]`` and g in ``G [OUT]``; ``GIVEN``: it is ``g [BO]``."""
    total = unit.to(tl.float32) * 0
    for start in range(0, OUT, BO):
        out = start + tl.arange(0, BO)
        inside = (unit < F)[:, None] & (out < OUT)[None, :]  # [S, BO]
        w = numbers(W + unit[:, None] * OUT + out[None, :], inside)
        if GIVEN:
            now = g
        else:
            now = vector(G, out, OUT)
        total += tl.sum(w * now[None, :], 1)
    return total


@triton.jit
def subtract_chunk(
    u, AFFINITY, PARTS, SCALE, G, g, position, unit, C: tl.constexpr, BC: tl.constexpr, F: tl.constexpr,
    SLICES: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``u [S]`` minus the sum over t of the affinity of slot t times its gradient, ``G [C, F]`` at ``unit [S]``.

    Slots from ``position`` on are not read, and that at ``position`` has ``g [S]``. Affinities, scale * (x a_t + 1),
    are ``AFFINITY [C]``, or where that is None, of x a_t in ``PARTS [P, C]``.
    """
    for start in range(0, C, BC):
        slot = start + tl.arange(0, BC)
        inside = (slot < position)[:, None] & (unit < F)[None, :]  # [BC, S]
        older = numbers(G + slot[:, None] * F + unit[None, :], inside)
        rows = tl.where((slot == position)[:, None], g[None, :], older)
        if AFFINITY is not None:
            affinity = tl.load(AFFINITY + slot, mask=slot <= position, other=0.0)
        else:
            found = tl.load(SCALE + position) * (sum_of_parts(PARTS, slot, C, SLICES, BP) + 1)
            affinity = tl.where(slot <= position, found, 0.0)
        u -= tl.sum(affinity[:, None] * rows, 0)
    return u


@triton.jit
def descend_columns(
    W, B, INPUT, G, g, scale, column, unit, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Columns ``unit [S]`` of ``W [D, F]`` and of ``B [F]`` after a chunk, in place.

    ``INPUT [C, D]`` and ``G [C, F]`` have the chunk's tokens; the gradient of the last one is ``g [S]``.
    """
    place = column[:, None] * F + unit[None, :]
    inside = (column < D)[:, None] & (unit < F)[None, :]  # [D, S]
    w, total = numbers(W + place, inside), g
    w -= (scale * vector(INPUT + (C - 1) * D, column, D))[:, None] * g[None, :]
    for t in tl.range(0, C - 1, loop_unroll_factor=4):
        x, now = vector(INPUT + t * D, column, D), vector(G + t * F, unit, F)
        w -= (scale * x)[:, None] * now[None, :]
        total += now
    tl.store(W + place, w, mask=inside)
    tl.store(B + unit, vector(B, unit, F) - scale * total, mask=unit < F)


@triton.jit
def descend_bias(B, G, scale, unit, F: tl.constexpr, C: tl.constexpr):
    """Elements ``unit [S]`` of ``B [F]`` after a chunk with gradients ``G [C, F]``, in place."""
    total = unit.to(tl.float32) * 0
    for t in tl.range(0, C, loop_unroll_factor=4):
        total += vector(G + t * F, unit, F)
    tl.store(B + unit, vector(B, unit, F) - scale * total, mask=unit < F)


@triton.jit
def descend_rows(
    W, INPUT, G, g, scale, unit, F: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Rows ``unit [S]`` of ``W [F, OUT]`` after a chunk, in place, from ``INPUT [C, F]`` and ``G [C, OUT]``.

    ``GIVEN``: the gradient of the last token is ``g [BO]``, with OUT no more than BO.
    """
    for start in range(0, OUT, BO):
        out = start + tl.arange(0, BO)
        inside = (unit < F)[:, None] & (out < OUT)[None, :]  # [S, BO]
        place = unit[:, None] * OUT + out[None, :]
        w = numbers(W + place, inside)
        if GIVEN:
            now = g
        else:
            now = vector(G + (C - 1) * OUT, out, OUT)
        w -= (scale * vector(INPUT + (C - 1) * F, unit, F))[:, None] * now[None, :]
        for t in tl.range(0, C - 1, loop_unroll_factor=4):
            x, gradient = vector(INPUT + t * F, unit, F), vector(G + t * OUT, out, OUT)
            w -= (scale * x)[:, None] * gradient[None, :]
        tl.store(W + place, w, mask=inside)


@triton.jit
def clear(POINTER, index, SIZE: tl.constexpr, C: tl.constexpr):
    """Zero at ``index [n]`` of every slot of ``POINTER [C, SIZE]``."""
    zero = index.to(tl.float32) * 0
    for t in range(C):
        tl.store(POINTER + t * SIZE + index, zero, mask=index < SIZE)
