"""TTT-Linear training: two kernels forward, four backward.

What goes from chunk to chunk is W alone (backward: its gradient). One program a row and head walks along the chunks and
computes that, and nothing else (``linear_states``, ``linear_state_gradients``). Outputs, and all gradients that do not
need what comes later, are computed for all chunks at once.

W of a head does not fit into the registers beside what a product of it needs. So it stays in memory, W of each chunk in
a place of its own, and products with it are made in slices of ``S`` of its rows. A program that reads what it has
written itself waits for all its threads in between (``tl.debug_barrier``).

Between the passes, W at the start of every group of chunks is kept; ``linear_weights`` makes the others again, from the
kept gradients g.

Tensors of tokens are ``[B, T, H, D]`` and ``[B, T, H]``, contiguous; ``W [B, H, N + 1, D, D]`` and ``BIAS
[B, H, N + 1, D]`` are those before each chunk, and at the end. ``SCALE [B, N]`` is by how much the update of each chunk
is scaled; 0 where there is none.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width, S rows of W in a slice, ``EVERY`` chunks a
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.train_parts import (
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
def times_matrix(
    X, W, start, inside, first, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr
):
    """``[C, D]``: rows of ``X`` times a matrix ``[D, D]``, which begins at ``W + first``.

    The rows begin at ``start [C]``, and are zero where not ``inside [C, 1]``.
    """
    part, column = tl.arange(0, S), tl.arange(0, D)
    total = tl.zeros([C, D], tl.float32)
    for row in range(0, D, S):
        x = rows_of(X, start[:, None] + row + part[None, :], inside)
        total += product(x, tl.load(W + first + (row + part)[:, None] * D + column[None, :]), PRECISION)
    return total


@triton.jit
def linear_states(
    K, V, LR, NORM_W, NORM_B, SCALE, W, BIAS, G, Z, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chain of W, from that before the first chunk: gradients ``G``, and outputs ``Z`` at the keys.

    ``GIVEN``: see ``key_gradient``.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // H, bh % H
    slot, column, part = tl.arange(0, C), tl.arange(0, D), tl.arange(0, S)
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    b = tl.load(BIAS + bh * (N + 1) * D + column)
    for chunk in range(N):
        token = chunk * C + slot
        inside = (token < T)[:, None]
        at = (row * T + token) * H + head
        place = at[:, None] * D + column[None, :]
        now = (bh * (N + 1) + chunk) * D * D
        z = times_matrix(K, W, at * D, inside, now, C, D, S, PRECISION) + b[None, :]
        rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
        value, key = rows_of(V, place, inside), rows_of(K, place, inside)
        g = key_gradient(z, value, key, rate, norm_w, norm_b, eps, D, GIVEN)
        tl.store(Z + place, z, mask=inside)
        tl.store(G + place, g, mask=inside)
        scale = tl.load(SCALE + row * N + chunk)
        for first in range(0, D, S):
            k = rows_of(K, at[:, None] * D + first + part[None, :], inside)
            square = now + (first + part)[:, None] * D + column[None, :]
            w = tl.load(W + square) - scale * product(tl.trans(k), g, PRECISION)
            tl.store(W + square + D * D, w)
        b -= scale * tl.sum(g, 0)
        tl.store(BIAS + (bh * (N + 1) + chunk + 1) * D + column, b)
        tl.debug_barrier()


@triton.jit
def linear_weights(
    K, G, SCALE, KEPT_W, W, T, H, N, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W before each chunk again, a group and a slice of rows a program, from ``KEPT_W [B, H, groups, D, D]``."""
    bh, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    part = tl.program_id(2) * S + tl.arange(0, S)
    square = part[:, None] * D + column[None, :]
    w = tl.load(KEPT_W + (bh * ((N + EVERY - 1) // EVERY) + group) * D * D + square)
    for chunk in range(group * EVERY, min(group * EVERY + EVERY, N)):
        tl.store(W + (bh * (N + 1) + chunk) * D * D + square, w)
        token = chunk * C + slot
        inside = (token < T)[:, None]
        start = ((row * T + token) * H + head)[:, None] * D
        k, g = rows_of(K, start + part[None, :], inside), rows_of(G, start + column[None, :], inside)
        w -= tl.load(SCALE + row * N + chunk) * product(tl.trans(k), g, PRECISION)


@triton.jit
def linear_outputs(
    Q, K, G, NORM_W, NORM_B, TOKEN_SCALE, W, BIAS, Y, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs ``Y`` of a chunk."""
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    before = bh * (N + 1) + chunk
    token = chunk * C + slot
    inside = (token < T)[:, None]
    at = (row * T + token) * H + head
    place = at[:, None] * D + column[None, :]
    q = rows_of(Q, place, inside)
    affinity = token_scale * visible(product(q, tl.trans(rows_of(K, place, inside)), PRECISION) + 1, C, CAUSAL)
    z = times_matrix(Q, W, at * D, inside, before * D * D, C, D, S, PRECISION)
    z += tl.load(BIAS + before * D + column)[None, :] - product(affinity, rows_of(G, place, inside), PRECISION)
    n, _ = normalized(z, eps, D)
    q = rows_of(Q, place, inside)  # again: there are no registers to hold it
    tl.store(Y + place, (q + n * norm_w + norm_b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def linear_output_gradients(
    Q, K, G, DY, NORM_W, TOKEN_SCALE, W, BIAS, DZ_QUERY, DQ, DK, DG, D_TOKEN_SCALE, D_NORM_W, D_NORM_B, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The way back from a chunk's outputs: all of ``DQ``, the queries' part of ``DK`` and ``DG``, z's at the queries.

    ``D_TOKEN_SCALE [B, H, N, C]``, ``D_NORM_W`` and ``D_NORM_B [B, H, N, D]``: this chunk's part.
    """
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column, part = tl.arange(0, C), tl.arange(0, D), tl.arange(0, S)
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    before = bh * (N + 1) + chunk
    token = chunk * C + slot
    inside = (token < T)[:, None]
    at = (row * T + token) * H + head
    place = at[:, None] * D + column[None, :]
    k = rows_of(K, place, inside)
    affinity = visible(product(rows_of(Q, place, inside), tl.trans(k), PRECISION) + 1, C, CAUSAL)
    g = rows_of(G, place, inside)
    z = times_matrix(Q, W, at * D, inside, before * D * D, C, D, S, PRECISION)
    z += tl.load(BIAS + before * D + column)[None, :] - product(token_scale * affinity, g, PRECISION)
    n, r = normalized(z, eps, D)
    dy = rows_of(DY, place, inside)
    tl.store(D_NORM_W + (bh * N + chunk) * D + column, tl.sum(dy * n, 0))
    tl.store(D_NORM_B + (bh * N + chunk) * D + column, tl.sum(dy, 0))
    dz = norm_backward(dy * tl.load(NORM_W + head * D + column)[None, :], n, r, D)
    d_affinity = -visible(product(dz, tl.trans(g), PRECISION), C, CAUSAL)
    tl.store(D_TOKEN_SCALE + (bh * N + chunk) * C + slot, tl.sum(d_affinity * affinity, 1))
    d_affinity *= token_scale
    tl.store(DZ_QUERY + place, dz, mask=inside)
    tl.store(DG + place, -product(tl.trans(token_scale * affinity), dz, PRECISION), mask=inside)
    for first in range(0, D, S):
        some = at[:, None] * D + first + part[None, :]  # [C, S]
        w = tl.load(W + before * D * D + (first + part)[:, None] * D + column[None, :])
        dq = rows_of(DY, some, inside) + product(dz, tl.trans(w), PRECISION)
        dq += product(d_affinity, rows_of(K, some, inside), PRECISION)
        tl.store(DQ + some, dq.to(DQ.dtype.element_ty), mask=inside)
        tl.store(DK + some, product(tl.trans(d_affinity), rows_of(Q, some, inside), PRECISION), mask=inside)


@triton.jit
def linear_state_gradients(
    Q, K, V, LR, G, Z, NORM_W, NORM_B, SCALE, DZ_QUERY, DG, DW, DB, DZ, DK, DV, D_SCALE, D_NORM_W, D_NORM_B,
    T, H, N, eps, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chain of W's gradient, from the last chunk to the first, and what needs it.

    ``DW [B, H, D, D]`` and ``DB [B, H, D]`` are those after the last chunk, and then those before the first. ``DK`` is
    added to, but for what comes through the target, which is ``-DV``, and through z at the keys, whose gradient is
    ``DZ``. ``DG`` becomes the whole gradient of g. ``D_SCALE [B, H, N]``.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // H, bh % H
    slot, column, part = tl.arange(0, C), tl.arange(0, D), tl.arange(0, S)
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    db = tl.load(DB + bh * D + column)
    d_norm_w, d_norm_b = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for step in range(N):
        chunk = N - 1 - step
        token = chunk * C + slot
        inside = (token < T)[:, None]
        at = (row * T + token) * H + head
        place = at[:, None] * D + column[None, :]
        scale = tl.load(SCALE + row * N + chunk)
        g = rows_of(G, place, inside)
        through = times_matrix(K, DW, at * D, inside, bh * D * D, C, D, S, PRECISION) + db[None, :]
        tl.store(D_SCALE + bh * N + chunk, -tl.sum(g * through))
        dg = rows_of(DG, place, inside) - scale * through
        z, target = rows_of(Z, place, inside), rows_of(V, place, inside) - rows_of(K, place, inside)
        rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
        if GIVEN:
            rate = tl.maximum(rate, 0.0)
        tl.store(DG + place, dg, mask=inside)
        dz, du, for_w, for_b = loss_gradient_backward(rate * dg, z, target, norm_w, norm_b, eps, D)
        d_norm_w += for_w
        d_norm_b += for_b
        tl.store(DV + place, -du * norm_w, mask=inside)
        tl.store(DZ + place, dz, mask=inside)
        dz_query = rows_of(DZ_QUERY, place, inside)
        db += tl.sum(dz, 0) + tl.sum(dz_query, 0)
        tl.debug_barrier()
        for first in range(0, D, S):
            some = at[:, None] * D + first + part[None, :]  # [C, S]
            square = bh * D * D + (first + part)[:, None] * D + column[None, :]
            dw = tl.load(DW + square)
            dk = rows_of(DK, some, inside) - scale * product(g, tl.trans(dw), PRECISION)
            dw += product(tl.trans(rows_of(K, some, inside)), dz, PRECISION)
            dw += product(tl.trans(rows_of(Q, some, inside)), dz_query, PRECISION)
            tl.debug_barrier()
            tl.store(DK + some, dk, mask=inside)
            tl.store(DW + square, dw)
        tl.debug_barrier()
    tl.store(DB + bh * D + column, db)
    tl.store(D_NORM_W + bh * D + column, d_norm_w)
    tl.store(D_NORM_B + bh * D + column, d_norm_b)


@triton.jit
def linear_key_gradients(
    K, V, Z, NORM_W, NORM_B, DG, DZ, DV, W, DK, D_LR, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What comes to a chunk's keys through the target and through z, added to ``DK``; and the rates' gradients."""
    bh, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column, part = tl.arange(0, C), tl.arange(0, D), tl.arange(0, S)
    token = chunk * C + slot
    inside = (token < T)[:, None]
    at = (row * T + token) * H + head
    place = at[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    target = rows_of(V, place, inside) - rows_of(K, place, inside)
    unscaled = loss_gradient(rows_of(Z, place, inside), target, norm_w, norm_b, eps, D)
    tl.store(D_LR + at, tl.sum(rows_of(DG, place, inside) * unscaled, 1), mask=token < T)
    dz = rows_of(DZ, place, inside)
    for first in range(0, D, S):
        some = at[:, None] * D + first + part[None, :]
        w = tl.load(W + (bh * (N + 1) + chunk) * D * D + (first + part)[:, None] * D + column[None, :])
        dk = rows_of(DK, some, inside) - rows_of(DV, some, inside) + product(dz, tl.trans(w), PRECISION)
        tl.store(DK + some, dk, mask=inside)
