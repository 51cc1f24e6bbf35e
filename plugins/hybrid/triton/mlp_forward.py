"""TTT-MLP training, forward: one launch a chunk, over rows, heads and slices of the hidden width.

In float32 the two matrices of a head are 512 KiB at D 128, more than a multiprocessor holds. So a program has a slice
of ``S`` hidden units: S columns of W1, S rows of W2. Slices meet where z2 = gelu(z1) W2 + b2 is summed over the hidden
width, once a chunk; the end of a launch is where all programs wait for each other. ``mlp_chunk`` therefore begins with
that sum of a chunk, updates its slice, and ends with its slice's part of the next chunk's sum.

With ``GIVEN``, a token whose rate is below 0 is from before the call: its value is g2, and what the token is, is a
constant.

Tensors of tokens are ``[B, T, H, D]`` and ``[B, T, H]``, contiguous. W1 is ``[B, H, D, F]``, b1 ``[B, H, F]``, W2
``[B, H, F, D]``, b2 ``[B, H, D]``. ``SCALE [B, N]`` is by how much the update of each chunk is scaled; 0: no update.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width, F hidden width, P = F / S slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.train_parts import (
    gelu,
    gelu_slope,
    key_gradient,
    normalized,
    product,
    rows_of,
    visible,
)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def sum_of_slices(PARTS, bh, C: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr):
    """``[C, D]``, of ``PARTS [B, H, P, C, D]``."""
    tile = tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]
    total = tl.zeros([C, D], tl.float32)
    for part in range(SLICES):
        total += tl.load(PARTS + (bh * SLICES + part) * C * D + tile)
    return total


@triton.jit
def mlp_first_keys(
    K, W1, B1, W2, PART, T, H, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A slice's part of z2 at the first chunk's keys, into ``PART [B, H, P, C, D]``."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, column, unit = tl.arange(0, C), tl.arange(0, D), part * S + tl.arange(0, S)
    width: tl.constexpr = S * SLICES
    at = ((bh // H) * T + slot) * H + bh % H
    k = rows_of(K, at[:, None] * D + column[None, :], (slot < T)[:, None])
    w1 = tl.load(W1 + bh * D * width + column[:, None] * width + unit[None, :])
    x2 = gelu(product(k, w1, PRECISION) + tl.load(B1 + bh * width + unit)[None, :])
    w2 = tl.load(W2 + bh * D * width + unit[:, None] * D + column[None, :])
    tile = slot[:, None] * D + column[None, :]
    tl.store(PART + (bh * SLICES + part) * C * D + tile, product(x2, w2, PRECISION))


@triton.jit
def mlp_chunk(
    Q, K, V, LR, NORM_W, NORM_B, TOKEN_SCALE, SCALE, PART, W1, B1, W2, B2, Z2, NEXT_PART, NEXT_W1, NEXT_B1, NEXT_W2,
    NEXT_B2, QUERY_PART, T, H, N, CHUNK, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, CAUSAL: tl.constexpr,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk ``CHUNK``: its update from W to NEXT_W, a slice's part of its outputs, and of the next chunk's z2.

    ``QUERY_PART [B, H, P, C, D]`` is the part of z2 at the queries; ``Z2``, at the keys, is written by the first slice.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column, unit = tl.arange(0, C), tl.arange(0, D), part * S + tl.arange(0, S)
    width: tl.constexpr = S * SLICES
    token = CHUNK * C + slot
    inside = (token < T)[:, None]
    at = (row * T + token) * H + head
    place = at[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    b2 = tl.load(B2 + bh * D + column)
    k = rows_of(K, place, inside)
    z2 = sum_of_slices(PART, bh, C, D, SLICES) + b2[None, :]
    rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
    g2 = key_gradient(z2, rows_of(V, place, inside), k, rate, norm_w, norm_b, eps, D, GIVEN)
    scale = tl.load(SCALE + row * N + CHUNK)
    if part == 0:
        tl.store(Z2 + place, z2, mask=inside)
        tl.store(NEXT_B2 + bh * D + column, b2 - scale * tl.sum(g2, 0))
    first = bh * D * width + column[:, None] * width + unit[None, :]  # [D, S] of W1
    second = bh * D * width + unit[:, None] * D + column[None, :]  # [S, D] of W2
    w1, b1, w2 = tl.load(W1 + first), tl.load(B1 + bh * width + unit), tl.load(W2 + second)
    z1 = product(k, w1, PRECISION) + b1[None, :]
    x2 = gelu(z1)
    g1 = product(g2, tl.trans(w2), PRECISION) * gelu_slope(z1)
    q = rows_of(Q, place, inside)
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    affinity = token_scale * visible(product(q, tl.trans(k), PRECISION) + 1, C, CAUSAL)
    xq = gelu(product(q, w1, PRECISION) + b1[None, :] - product(affinity, g1, PRECISION))
    once = tl.where(part == 0, 1.0, 0.0)  # what no slice has a part of comes with the first
    affinity = token_scale * visible(product(xq, tl.trans(x2), PRECISION) + once, C, CAUSAL)
    tile = slot[:, None] * D + column[None, :]
    outcome = product(xq, w2, PRECISION) - product(affinity, g2, PRECISION) + once * b2[None, :]
    tl.store(QUERY_PART + (bh * SLICES + part) * C * D + tile, outcome)
    w1 -= scale * product(tl.trans(k), g1, PRECISION)
    w2 -= scale * product(tl.trans(x2), g2, PRECISION)
    b1 -= scale * tl.sum(g1, 0)
    tl.store(NEXT_W1 + first, w1)
    tl.store(NEXT_W2 + second, w2)
    tl.store(NEXT_B1 + bh * width + unit, b1)
    token += C
    following = rows_of(K, place + C * H * D, (token < T)[:, None])
    x2 = gelu(product(following, w1, PRECISION) + b1[None, :])
    tl.store(NEXT_PART + (bh * SLICES + part) * C * D + tile, product(x2, w2, PRECISION))


@triton.jit
def mlp_outputs(
    Q, NORM_W, NORM_B, QUERY_PARTS, ZQ, Y, T, H, BH, FIRST, eps,
    C: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """z2 at the queries, ``ZQ``, and the outputs ``Y`` of chunk ``FIRST`` and those after it.

    ``QUERY_PARTS [chunks, B, H, P, C, D]``.
    """
    bh, index = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    token = (FIRST + index) * C + slot
    inside = (token < T)[:, None]
    place = ((row * T + token) * H + head)[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    z = sum_of_slices(QUERY_PARTS, index * BH + bh, C, D, SLICES)
    n, _ = normalized(z, eps, D)
    tl.store(ZQ + place, z, mask=inside)
    tl.store(Y + place, (rows_of(Q, place, inside) + n * norm_w + norm_b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def mlp_outputs_again(Q, NORM_W, NORM_B, ZQ, Y, T, H, eps, C: tl.constexpr, D: tl.constexpr):
    """The outputs ``Y`` of a chunk, from z2 at the queries."""
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, slot, column = bh % H, tl.arange(0, C), tl.arange(0, D)
    token = chunk * C + slot
    inside = (token < T)[:, None]
    place = (((bh // H) * T + token) * H + head)[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    n, _ = normalized(rows_of(ZQ, place, inside), eps, D)
    tl.store(Y + place, (rows_of(Q, place, inside) + n * norm_w + norm_b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def mlp_states(
    K, V, LR, NORM_W, NORM_B, SCALE, Z2, W1, B1, W2, KEPT_W1, KEPT_B1, KEPT_W2, T, H, BH, N, FIRST, LAST, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The fast weights after chunks ``FIRST`` to ``LAST - 1``, again, from those before: with z2 kept, slices part.

    Into ``KEPT_W1 [chunks, B, H, D, F]`` and so on; without b2.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column, unit = tl.arange(0, C), tl.arange(0, D), part * S + tl.arange(0, S)
    width: tl.constexpr = S * SLICES
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    first = bh * D * width + column[:, None] * width + unit[None, :]
    second = bh * D * width + unit[:, None] * D + column[None, :]
    w1, b1, w2 = tl.load(W1 + first), tl.load(B1 + bh * width + unit), tl.load(W2 + second)
    for chunk in range(FIRST, LAST):
        token = chunk * C + slot
        inside = (token < T)[:, None]
        at = (row * T + token) * H + head
        place = at[:, None] * D + column[None, :]
        k = rows_of(K, place, inside)
        rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
        z2 = rows_of(Z2, place, inside)
        g2 = key_gradient(z2, rows_of(V, place, inside), k, rate, norm_w, norm_b, eps, D, GIVEN)
        z1 = product(k, w1, PRECISION) + b1[None, :]
        g1 = product(g2, tl.trans(w2), PRECISION) * gelu_slope(z1)
        scale = tl.load(SCALE + row * N + chunk)
        w1 -= scale * product(tl.trans(k), g1, PRECISION)
        w2 -= scale * product(tl.trans(gelu(z1)), g2, PRECISION)
        b1 -= scale * tl.sum(g1, 0)
        kept = (chunk - FIRST).to(tl.int64) * BH
        tl.store(KEPT_W1 + kept * D * width + first, w1)
        tl.store(KEPT_W2 + kept * D * width + second, w2)
        tl.store(KEPT_B1 + (kept + bh) * width + unit, b1)
