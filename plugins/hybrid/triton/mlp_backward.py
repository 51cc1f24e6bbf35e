"""TTT-MLP training, backward: three launches a chunk, from the last to the first, over rows, heads and slices.

As in ``mlp_forward`` a program has a slice of the hidden width, of the fast weights and of their gradients. The slices
meet once a chunk: where the gradient of g2, the loss's gradient at z2, is summed over the hidden width.
``mlp_first_layer_gradients`` ends there, ``mlp_key_gradients`` begins there.

``DW1``, ``DB1``, ``DW2`` and ``DB2`` hold the gradients of the fast weights after the chunk, and then of those before
it. W1, b1 and W2 are those before the chunk. ``*_PART`` are ``[B, H, P, C, D]``.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width, F hidden width, P = F / S slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.mlp_forward import sum_of_slices
from moshi_ttt.plugins.hybrid.triton.train_parts import (
    gelu,
    gelu_curvature,
    gelu_slope,
    key_gradient,
    loss_gradient,
    loss_gradient_backward,
    norm_backward,
    normalized,
    product,
    rows_of,
    visible,
)

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def mlp_output_gradients(DY, ZQ, NORM_W, DZQ, D_NORM_W, D_NORM_B, T, H, N, eps, C: tl.constexpr, D: tl.constexpr):
    """The gradient of z2 at the queries, of every chunk; ``D_NORM_W`` and ``D_NORM_B [B, H, N, D]``."""
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, column = tl.arange(0, C), tl.arange(0, D)
    token = chunk * C + slot
    inside = (token < T)[:, None]
    place = (((bh // H) * T + token) * H + bh % H)[:, None] * D + column[None, :]
    dy = rows_of(DY, place, inside)
    n, r = normalized(rows_of(ZQ, place, inside), eps, D)
    dz = norm_backward(dy * tl.load(NORM_W + (bh % H) * D + column)[None, :], n, r, D)
    tl.store(DZQ + place, dz, mask=inside)
    tl.store(D_NORM_W + (bh * N + chunk) * D + column, tl.sum(dy * n, 0))
    tl.store(D_NORM_B + (bh * N + chunk) * D + column, tl.sum(dy, 0))


@triton.jit
def mlp_second_layer_gradients(
    Q, K, V, LR, NORM_W, NORM_B, TOKEN_SCALE, SCALE, Z2, DZQ, W1, B1, W2, DW2, DB2, DX2, DZQ1, DG2_PART,
    D_TOKEN_SCALE, D_SCALE, T, H, N, CHUNK, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, CAUSAL: tl.constexpr,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the outputs and the update of chunk ``CHUNK`` through the second layer.

    ``DZQ1 [B, H, C, F]`` is the gradient of the first layer's output at the queries; ``DX2``, like it, that of the
    keys' hidden units, but for what comes through z2. ``D_TOKEN_SCALE [B, H, N, P, C]``, ``D_SCALE [B, H, N, P]`` and
    ``DG2_PART`` get this layer's share of the slice's part.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column, unit = tl.arange(0, C), tl.arange(0, D), part * S + tl.arange(0, S)
    width: tl.constexpr = S * SLICES
    once = tl.where(part == 0, 1.0, 0.0)
    token = CHUNK * C + slot
    inside = (token < T)[:, None]
    at = (row * T + token) * H + head
    place = at[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    k = rows_of(K, place, inside)
    rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
    z2 = rows_of(Z2, place, inside)
    g2 = key_gradient(z2, rows_of(V, place, inside), k, rate, norm_w, norm_b, eps, D, GIVEN)
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    first = bh * D * width + column[:, None] * width + unit[None, :]  # [D, S] of W1
    second = bh * D * width + unit[:, None] * D + column[None, :]  # [S, D] of W2
    w1, b1, w2 = tl.load(W1 + first), tl.load(B1 + bh * width + unit), tl.load(W2 + second)
    z1 = product(k, w1, PRECISION) + b1[None, :]
    x2 = gelu(z1)
    g1 = product(g2, tl.trans(w2), PRECISION) * gelu_slope(z1)
    q = rows_of(Q, place, inside)
    affinity = token_scale * visible(product(q, tl.trans(k), PRECISION) + 1, C, CAUSAL)
    zq1 = product(q, w1, PRECISION) + b1[None, :] - product(affinity, g1, PRECISION)
    xq, dzq2 = gelu(zq1), rows_of(DZQ, place, inside)
    affinity = visible(product(xq, tl.trans(x2), PRECISION) + once, C, CAUSAL)
    d_affinity = -visible(product(dzq2, tl.trans(g2), PRECISION), C, CAUSAL)
    which = (bh * N + CHUNK) * SLICES + part
    tl.store(D_TOKEN_SCALE + which * C + slot, tl.sum(d_affinity * affinity, 1))
    d_affinity *= token_scale
    hidden = (bh * C + slot)[:, None] * width + unit[None, :]
    dzq1 = product(dzq2, tl.trans(w2), PRECISION) + product(d_affinity, x2, PRECISION)
    tl.store(DZQ1 + hidden, dzq1 * gelu_slope(zq1))
    dw2, db2 = tl.load(DW2 + second), tl.load(DB2 + bh * D + column)[None, :]
    scale, through = tl.load(SCALE + row * N + CHUNK), product(g2, tl.trans(dw2), PRECISION)
    tl.store(D_SCALE + which, -tl.sum(x2 * through) - once * tl.sum(g2 * db2))
    dx2 = product(tl.trans(d_affinity), xq, PRECISION) - scale * through
    tl.store(DX2 + hidden, dx2)
    dg2 = product(tl.trans(token_scale * affinity), dzq2, PRECISION)
    dg2 += scale * (product(x2, dw2, PRECISION) + once * db2)
    tl.store(DG2_PART + (bh * SLICES + part) * C * D + slot[:, None] * D + column[None, :], -dg2)
    tl.store(DW2 + second, dw2 + product(tl.trans(xq), dzq2, PRECISION))


@triton.jit
def mlp_first_layer_gradients(
    Q, K, V, LR, NORM_W, NORM_B, TOKEN_SCALE, SCALE, Z2, W1, B1, W2, DW1, DB1, DW2, DZQ1, DZ1, DG2_PART, DQ_PART,
    DK_PART, D_TOKEN_SCALE, D_SCALE, T, H, N, CHUNK, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, CAUSAL: tl.constexpr,
    GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From ``DZQ1`` and the update through the first layer, to the queries, the keys and g2.

    ``DZ1 [B, H, C, F]`` is the gradient of the first layer's output at the keys, but for what comes through z2. This
    layer's share is added to ``D_TOKEN_SCALE``, ``D_SCALE`` and ``DG2_PART``.
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
    q, k = rows_of(Q, place, inside), rows_of(K, place, inside)
    rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
    z2 = rows_of(Z2, place, inside)
    g2 = key_gradient(z2, rows_of(V, place, inside), k, rate, norm_w, norm_b, eps, D, GIVEN)
    first = bh * D * width + column[:, None] * width + unit[None, :]
    second = bh * D * width + unit[:, None] * D + column[None, :]
    w1, w2 = tl.load(W1 + first), tl.load(W2 + second)
    z1 = product(k, w1, PRECISION) + tl.load(B1 + bh * width + unit)[None, :]
    h = product(g2, tl.trans(w2), PRECISION)
    g1 = h * gelu_slope(z1)
    hidden = (bh * C + slot)[:, None] * width + unit[None, :]
    dzq1 = tl.load(DZQ1 + hidden)
    affinity = visible(product(q, tl.trans(k), PRECISION) + 1, C, CAUSAL)
    d_affinity = -visible(product(dzq1, tl.trans(g1), PRECISION), C, CAUSAL)
    sums = D_TOKEN_SCALE + ((bh * N + CHUNK) * SLICES + part) * C + slot
    tl.store(sums, tl.load(sums) + tl.sum(d_affinity * affinity, 1))
    token_scale, scale = tl.load(TOKEN_SCALE + slot)[:, None], tl.load(SCALE + row * N + CHUNK)
    d_affinity *= token_scale
    dw1, db1 = tl.load(DW1 + first), tl.load(DB1 + bh * width + unit)
    through = product(k, dw1, PRECISION) + db1[None, :]
    total = D_SCALE + (bh * N + CHUNK) * SLICES + part
    tl.store(total, tl.load(total) - tl.sum(g1 * through))
    dg1 = -product(tl.trans(token_scale * affinity), dzq1, PRECISION) - scale * through
    if GIVEN:
        dg1 = tl.where(rate < 0, 0.0, dg1)
    tl.store(DZ1 + hidden, dg1 * h * gelu_curvature(z1))
    dh = dg1 * gelu_slope(z1)
    tile = (bh * SLICES + part) * C * D + slot[:, None] * D + column[None, :]
    tl.store(DG2_PART + tile, tl.load(DG2_PART + tile) + product(dh, w2, PRECISION))
    tl.store(DW2 + second, tl.load(DW2 + second) + product(tl.trans(dh), g2, PRECISION))
    tl.store(DQ_PART + tile, product(dzq1, tl.trans(w1), PRECISION) + product(d_affinity, k, PRECISION))
    dk = product(tl.trans(d_affinity), q, PRECISION) - scale * product(g1, tl.trans(dw1), PRECISION)
    tl.store(DK_PART + tile, dk)
    tl.store(DW1 + first, dw1 + product(tl.trans(q), dzq1, PRECISION))
    tl.store(DB1 + bh * width + unit, db1 + tl.sum(dzq1, 0))


@triton.jit
def mlp_key_gradients(
    K, V, LR, NORM_W, NORM_B, Z2, DZQ, DG2_PART, W1, B1, W2, DW1, DB1, DW2, DB2, DX2, DZ1, DK_PART, DV, D_LR, D_NORM_W,
    D_NORM_B, T, H, N, CHUNK, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From g2's gradient through the keys' pass; what no slice has a part of is written by the first.

    ``DK_PART`` is added to. ``D_NORM_W`` and ``D_NORM_B [B, H, N, D]``.
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
    k = rows_of(K, place, inside)
    rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
    if GIVEN:
        rate = tl.maximum(rate, 0.0)
    z2, target = rows_of(Z2, place, inside), rows_of(V, place, inside) - k
    dg2 = sum_of_slices(DG2_PART, bh, C, D, SLICES)
    dz2, du, for_w, for_b = loss_gradient_backward(rate * dg2, z2, target, norm_w, norm_b, eps, D)
    if part == 0:
        tl.store(D_LR + at, tl.sum(dg2 * loss_gradient(z2, target, norm_w, norm_b, eps, D), 1), mask=token < T)
        tl.store(DV + place, (-du * norm_w).to(DV.dtype.element_ty), mask=inside)
        tl.store(D_NORM_W + (bh * N + CHUNK) * D + column, for_w)
        tl.store(D_NORM_B + (bh * N + CHUNK) * D + column, for_b)
        db2 = tl.load(DB2 + bh * D + column) + tl.sum(dz2, 0) + tl.sum(rows_of(DZQ, place, inside), 0)
        tl.store(DB2 + bh * D + column, db2)
    first = bh * D * width + column[:, None] * width + unit[None, :]
    second = bh * D * width + unit[:, None] * D + column[None, :]
    w1, b1, w2 = tl.load(W1 + first), tl.load(B1 + bh * width + unit), tl.load(W2 + second)
    hidden = (bh * C + slot)[:, None] * width + unit[None, :]
    z1 = product(k, w1, PRECISION) + b1[None, :]
    dx2 = tl.load(DX2 + hidden)
    if GIVEN:  # here, where there are registers for it: what is given has no gradient
        dx2 = tl.where(tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None] < 0, 0.0, dx2)
    dx2 += product(dz2, tl.trans(w2), PRECISION)
    dz1 = tl.load(DZ1 + hidden) + dx2 * gelu_slope(z1)
    tile = (bh * SLICES + part) * C * D + slot[:, None] * D + column[None, :]
    dk = tl.load(DK_PART + tile) + product(dz1, tl.trans(w1), PRECISION)
    tl.store(DK_PART + tile, dk + tl.where(part == 0, 1.0, 0.0) * du * norm_w)
    tl.store(DW2 + second, tl.load(DW2 + second) + product(tl.trans(gelu(z1)), dz2, PRECISION))
    tl.store(DW1 + first, tl.load(DW1 + first) + product(tl.trans(k), dz1, PRECISION))
    tl.store(DB1 + bh * width + unit, tl.load(DB1 + bh * width + unit) + tl.sum(dz1, 0))


@triton.jit
def mlp_token_gradients(
    DY, DQ_PARTS, DK_PARTS, DQ, DK, T, H, BH, FIRST, C: tl.constexpr, D: tl.constexpr, SLICES: tl.constexpr
):
    """The gradients of queries and keys of chunk ``FIRST`` and those after it: the sums of the slices' parts.

    ``DQ_PARTS`` and ``DK_PARTS [chunks, B, H, P, C, D]``.
    """
    bh, index = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot, column = tl.arange(0, C), tl.arange(0, D)
    token = (FIRST + index) * C + slot
    inside = (token < T)[:, None]
    place = (((bh // H) * T + token) * H + bh % H)[:, None] * D + column[None, :]
    dq = rows_of(DY, place, inside) + sum_of_slices(DQ_PARTS, index * BH + bh, C, D, SLICES)
    dk = sum_of_slices(DK_PARTS, index * BH + bh, C, D, SLICES)
    tl.store(DQ + place, dq.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DK + place, dk.to(DK.dtype.element_ty), mask=inside)
