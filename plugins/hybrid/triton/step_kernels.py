"""The inner loop of one streamed token: kernels of a fast network of any depth.

Each program has a row, a head and a slice of ``S`` units of one layer's output. Slices meet where a layer's output is
summed over its inputs: at the end of a launch. In order, for layers 0 to L - 1:

    keys            layer 0 at the key and at the query, which read W_0 once; a slice's part of layer 1 at the key
    more_keys       of layers 1 to L - 2: the same further on
    gradients       of layers L - 1 to 2: the gradient at a layer's output becomes that at its input
    queries         of layers 0 to L - 2: the output at the query, a slice's part of the next layer. The first one takes
                    the gradient's last step. Where a chunk ends, the weights on both sides of the slice are updated.
    linear_queries  in the place of ``queries`` where L is 1
    outputs         one program for each head: the norm, y, the last bias, the counters

Two launches have both sides of a hidden layer, so W_1 of TTT-MLP is read twice, and W_0 once. The update is behind a
branch on the device: only at the end of a chunk are weights written to.

Tensors of the token are ``[B, H, D]`` and ``[B, H]``; the state's are as in ``inner_loop``, contiguous. ``OK [B, H]``
and ``NOW [B, 2]``: see ``step_parts.row_now``. ``ACTIVE`` and ``UPDATED [B]`` are masks or None.

Shape legend: B rows, H heads, C tokens a chunk, D head width, F hidden width, P slices of S units, L layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.step_parts import (
    add_next_parts,
    back_through,
    clear,
    descend_bias,
    descend_columns,
    descend_rows,
    moments,
    numbers,
    output_gradient,
    row_now,
    subtract_chunk,
    sum_of_parts,
    vector,
    vector_where,
)
from moshi_ttt.plugins.hybrid.triton.train_parts import gelu, gelu_slope

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def keys(
    Q, K, OK, NOW, ACTIVE, W, B, NEXT_W, INPUT, NEXT_INPUT, SCALE, Z, QUERY, AFFINITY, PART,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    F: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """``Z`` and ``QUERY [B, H, F]``, layer 0 at the key and at the query, and ``PART [B, H, P, OUT]`` of layer 1.

    The first slice writes the key to its slot, and ``AFFINITY [B, H, C]``, scale * (q k_t + 1), of slots with a token.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = bh // H
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position, finite, _ = row_now(NOW, OK, None, row, H, HEADS)
    column, unit = tl.arange(0, BD), part * S + tl.arange(0, S)
    k, q = vector_where(finite, K + bh * D, column, D), vector_where(finite, Q + bh * D, column, D)
    inside = (column < D)[:, None] & (unit < F)[None, :]  # [D, S]
    w = numbers(W + bh * D * F + column[:, None] * F + unit[None, :], inside)
    bias = vector(B + bh * F, unit, F)
    z = tl.sum(k[:, None] * w, 0) + bias
    tl.store(Z + bh * F + unit, z, mask=unit < F)
    tl.store(QUERY + bh * F + unit, tl.sum(q[:, None] * w, 0) + bias, mask=unit < F)
    if LAYERS > 1:
        x = gelu(z)
        tl.store(NEXT_INPUT + (bh * C + position) * F + unit, x, mask=unit < F)
        add_next_parts(x, NEXT_W + bh * F * OUT, PART + (bh * SLICES + part) * OUT, unit, F, OUT, BO)
    if part == 0:
        scale = tl.load(SCALE + position)
        for start in range(0, C, BC):
            slot = start + tl.arange(0, BC)
            older = (slot < position)[:, None] & (column < D)[None, :]  # [BC, D]
            place = (bh * C + slot)[:, None] * D + column[None, :]
            seen = numbers(INPUT + place, older)
            seen = tl.where((slot == position)[:, None], k[None, :], seen)
            tl.store(AFFINITY + bh * C + slot, scale * (tl.sum(seen * q[None, :], 1) + 1), mask=slot <= position)
        tl.store(INPUT + (bh * C + position) * D + column, k, mask=column < D)


@triton.jit
def more_keys(
    OK, NOW, ACTIVE, B, NEXT_W, NEXT_INPUT, PART, Z, NEXT_PART,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr,
    BEFORE: tl.constexpr, BP: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """``Z [B, H, F]``, a further layer at the key, from ``PART [B, H, BEFORE, F]``, and a slice's part of the next."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = bh // H
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position, _, _ = row_now(NOW, OK, None, row, H, HEADS)
    unit = part * S + tl.arange(0, S)
    z = sum_of_parts(PART + bh * BEFORE * F, unit, F, BEFORE, BP) + vector(B + bh * F, unit, F)
    tl.store(Z + bh * F + unit, z, mask=unit < F)
    x = gelu(z)
    tl.store(NEXT_INPUT + (bh * C + position) * F + unit, x, mask=unit < F)
    add_next_parts(x, NEXT_W + bh * F * OUT, NEXT_PART + (bh * SLICES + part) * OUT, unit, F, OUT, BO)


@triton.jit
def token_gradient(
    K, V, LR, PART, B, NORM_W, NORM_B, bh, finite, eps,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SLICES: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """``[D]``, the gradient at the network's output of the token's loss, from ``PART [B, H, P, D]``."""
    column = tl.arange(0, BD)
    inside = column < D
    norm = (bh % H) * D
    z = sum_of_parts(PART + bh * SLICES * D, column, D, SLICES, BP) + vector(B + bh * D, column, D)
    target = vector_where(finite, V + bh * D, column, D) - vector_where(finite, K + bh * D, column, D)
    weight, bias = vector(NORM_W + norm, column, D), vector(NORM_B + norm, column, D)
    g, _, _, _, _ = output_gradient(z, target, weight, bias, inside, eps, D)
    return g * tl.where(finite, tl.load(LR + bh).to(tl.float32), 0.0)


@triton.jit
def gradients(
    K, V, LR, OK, NOW, ACTIVE, PART, NEXT_W, NEXT_B, NEXT_G, Z, G, NORM_W, NORM_B, eps,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr,
    BP: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """The token's slot of ``G [B, H, C, F]``: its gradient at a layer's output ``Z``, from that of the next layer.

    That is in its slot of ``NEXT_G``; with ``LOSS`` it is the loss's, and the first slice writes it there.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = bh // H
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position, finite, _ = row_now(NOW, OK, None, row, H, HEADS)
    unit, out = part * S + tl.arange(0, S), tl.arange(0, BO)
    slot = bh * C + position
    g = tl.zeros([BO], tl.float32)
    if LOSS:
        g = token_gradient(K, V, LR, PART, NEXT_B, NORM_W, NORM_B, bh, finite, eps, H, OUT, BO, SLICES, BP)
        if part == 0:
            tl.store(NEXT_G + slot * OUT + out, g, mask=out < OUT)
    back = back_through(g, NEXT_G + slot * OUT, NEXT_W + bh * F * OUT, unit, F, OUT, BO, LOSS)
    tl.store(G + slot * F + unit, back * gelu_slope(vector(Z + bh * F, unit, F)), mask=unit < F)


@triton.jit
def end_of_chunk(
    W, B, INPUT, G, g, NEXT_W, NEXT_INPUT, NEXT_G, next_g, SCALE, applied, unit,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr,
    FIRST: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Update, where ``applied``, the weights on both sides of a slice, and clear the slice's slots."""
    tl.debug_barrier()  # all threads have read the weights
    if applied:
        last = tl.load(SCALE + C - 1)
        if FIRST:
            descend_columns(W, B, INPUT, G, g, last, tl.arange(0, BD), unit, D, F, C)
        else:
            descend_bias(B, G, last, unit, F, C)
        descend_rows(NEXT_W, NEXT_INPUT, NEXT_G, next_g, last, unit, F, OUT, BO, C, LOSS)
    tl.debug_barrier()  # and the slots
    clear(G, unit, F, C)
    clear(NEXT_INPUT, unit, F, C)


@triton.jit
def queries(
    K, V, LR, OK, NOW, ACTIVE, UPDATED, W, B, INPUT, G, NEXT_W, NEXT_B, NEXT_INPUT, NEXT_G, SCALE, Z, U, AFFINITY,
    PART, QUERY_PART, AFFINITY_PART, NEXT_QUERY_PART, NEXT_AFFINITY_PART, NORM_W, NORM_B, eps,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    F: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, BP: tl.constexpr, BEFORE: tl.constexpr, BQ: tl.constexpr,
    OUT: tl.constexpr, BO: tl.constexpr, FIRST: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """A slice of a layer at the query, its part of the next layer and of that layer's affinities, and its update.

    ``FIRST`` (layer 0): the layer at the query without the chunk is ``U``, affinities are ``AFFINITY``, and the
    gradient ``G`` comes from ``NEXT_G``. Else from ``QUERY_PART [B, H, BEFORE, F]`` and ``AFFINITY_PART
    [B, H, BEFORE, C]``. ``LOSS``: the next layer is the last one and its gradient has not been taken.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = bh // H
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position, finite, spoiled = row_now(NOW, OK, UPDATED, row, H, HEADS)
    unit, out = part * S + tl.arange(0, S), tl.arange(0, BO)
    slot = bh * C + position
    next_g = tl.zeros([BO], tl.float32)
    if LOSS:
        next_g = token_gradient(K, V, LR, PART, NEXT_B, NORM_W, NORM_B, bh, finite, eps, H, OUT, BO, SLICES, BP)
        if part == 0:
            tl.store(NEXT_G + slot * OUT + out, next_g, mask=out < OUT)
    if FIRST:
        g = back_through(next_g, NEXT_G + slot * OUT, NEXT_W + bh * F * OUT, unit, F, OUT, BO, LOSS)
        g *= gelu_slope(vector(Z + bh * F, unit, F))
        tl.store(G + slot * F + unit, g, mask=unit < F)
        u = vector(U + bh * F, unit, F)
        u = subtract_chunk(u, AFFINITY + bh * C, None, SCALE, G + bh * C * F, g, position, unit, C, BC, F, 1, 1)
    else:
        g = vector(G + slot * F, unit, F)
        u = sum_of_parts(QUERY_PART + bh * BEFORE * F, unit, F, BEFORE, BQ) + vector(B + bh * F, unit, F)
        parts = AFFINITY_PART + bh * BEFORE * C
        u = subtract_chunk(u, None, parts, SCALE, G + bh * C * F, g, position, unit, C, BC, F, BEFORE, BQ)
    x = gelu(u)
    for start in range(0, C, BC):
        token = start + tl.arange(0, BC)
        seen = (token <= position)[:, None] & (unit < F)[None, :]  # [BC, S]
        inputs = numbers(NEXT_INPUT + (bh * C + token)[:, None] * F + unit[None, :], seen)
        tl.store(NEXT_AFFINITY_PART + (bh * SLICES + part) * C + token, tl.sum(inputs * x[None, :], 1), mask=token < C)
    add_next_parts(x, NEXT_W + bh * F * OUT, NEXT_QUERY_PART + (bh * SLICES + part) * OUT, unit, F, OUT, BO)
    if position == C - 1:
        end_of_chunk(
            W + bh * D * F, B + bh * F, INPUT + bh * C * D, G + bh * C * F, g, NEXT_W + bh * F * OUT,
            NEXT_INPUT + bh * C * F, NEXT_G + bh * C * OUT, next_g, SCALE, spoiled == 0, unit, C, D, BD, F, OUT, BO,
            FIRST, LOSS,
        )  # fmt: skip


@triton.jit
def linear_queries(
    K, V, LR, OK, NOW, ACTIVE, UPDATED, W, B, INPUT, G, SCALE, Z, U, AFFINITY, QUERY, NORM_W, NORM_B, eps,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """TTT-Linear: a slice of the network's output at the query, ``QUERY [B, H, D]``, of the gradient, and the update.

    From the output at the key, ``Z``, and at the query without the chunk, ``U``.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, norm = bh // H, (bh % H) * D
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position, finite, spoiled = row_now(NOW, OK, UPDATED, row, H, HEADS)
    column, unit = tl.arange(0, BD), part * S + tl.arange(0, S)
    target = vector_where(finite, V + bh * D, column, D) - vector_where(finite, K + bh * D, column, D)
    weight, bias = vector(NORM_W + norm, column, D), vector(NORM_B + norm, column, D)
    z = vector(Z + bh * D, column, D)
    _, mean, r, average, along = output_gradient(z, target, weight, bias, column < D, eps, D)
    target = vector_where(finite, V + bh * D, unit, D) - vector_where(finite, K + bh * D, unit, D)
    weight, bias = vector(NORM_W + norm, unit, D), vector(NORM_B + norm, unit, D)
    n = (vector(Z + bh * D, unit, D) - mean) * r
    rate = tl.where(finite, tl.load(LR + bh).to(tl.float32), 0.0)
    g = rate * r * ((n * weight + bias - target) * weight - average - n * along)
    g = tl.where(unit < D, g, 0.0)
    tl.store(G + (bh * C + position) * D + unit, g, mask=unit < D)
    u = vector(U + bh * D, unit, D)
    u = subtract_chunk(u, AFFINITY + bh * C, None, SCALE, G + bh * C * D, g, position, unit, C, BC, D, 1, 1)
    tl.store(QUERY + bh * D + unit, u, mask=unit < D)
    if position == C - 1:
        if spoiled == 0:
            last = tl.load(SCALE + C - 1)
            descend_columns(
                W + bh * D * D, B + bh * D, INPUT + bh * C * D, G + bh * C * D, g, last, column, unit, D, D, C
            )
        tl.debug_barrier()  # all threads have read
        clear(G + bh * C * D, unit, D, C)


@triton.jit
def outputs(
    Q, OK, NOW, ACTIVE, UPDATED, POSITION, SPOILED, SKIPPED, B, INPUT, G, SCALE, QUERY, AFFINITY_PART, NORM_W, NORM_B,
    Y, eps,
    H: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BEFORE: tl.constexpr, BQ: tl.constexpr, LAYERS: tl.constexpr,
):  # fmt: skip
    """``Y [B, H, D]``, q + LN(f(q)), zero in rows that are not active, and what ends a step of a row.

    f(q) is ``QUERY [B, H, D]`` of one layer; of several, from ``QUERY [B, H, BEFORE, D]`` and ``AFFINITY_PART
    [B, H, BEFORE, C]``.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, column = bh // H, tl.arange(0, BD)
    norm = (bh % H) * D
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            tl.store(Y + bh * D + column, tl.zeros([BD], tl.float32), mask=column < D)
            return
    position, finite, spoiled = row_now(NOW, OK, UPDATED, row, H, HEADS)
    if LAYERS == 1:
        u = vector(QUERY + bh * D, column, D)
    else:
        g = vector(G + (bh * C + position) * D, column, D)
        u = sum_of_parts(QUERY + bh * BEFORE * D, column, D, BEFORE, BQ) + vector(B + bh * D, column, D)
        parts = AFFINITY_PART + bh * BEFORE * C
        u = subtract_chunk(u, None, parts, SCALE, G + bh * C * D, g, position, column, C, BC, D, BEFORE, BQ)
    mean, r = moments(u, column < D, eps, D)
    weight, bias = vector(NORM_W + norm, column, D), vector(NORM_B + norm, column, D)
    q = vector_where(finite, Q + bh * D, column, D)
    tl.store(Y + bh * D + column, q + (u - mean) * r * weight + bias, mask=column < D)
    if position == C - 1:
        if LAYERS > 1:
            tl.debug_barrier()  # all threads have read the bias
            if spoiled == 0:
                descend_bias(B + bh * D, G + bh * C * D, tl.load(SCALE + C - 1), column, D, C)
            tl.debug_barrier()  # and the slots
            clear(G + bh * C * D, column, D, C)
        clear(INPUT + bh * C * D, column, D, C)
    if bh % H == 0:
        done = position == C - 1
        tl.store(POSITION + row, tl.where(done, 0, position + 1))
        tl.store(SPOILED + row, tl.where(done, 0, spoiled))
        skipped = tl.load(SKIPPED + row)
        tl.store(SKIPPED + row, tl.where(done & (spoiled > 0), skipped + 1, skipped))
