"""TTT-Linear training: two kernels forward, three backward.

What goes from chunk to chunk is W alone (backward: its gradient). One program a row and head walks along the chunks and
computes that, and nothing else (``linear_states``, ``linear_state_gradients``). Outputs, and all gradients that do not
need what comes later, are computed for all groups of chunks at once; a program starts from the W that was kept for its
group, and repeats the group's updates, from the kept gradients g, with the same operations.

Tensors of tokens are ``[B, T, H, D]`` and ``[B, T, H]``, contiguous; W is ``[B, H, D, D]``, and ``KEPT_W`` is
``[B, H, groups, D, D]``. ``SCALE [B, N]`` is by how much the update of each chunk is scaled; 0 where there is none.

Shape legend: B rows, H heads, T tokens, N chunks of C tokens, D head width, ``EVERY`` chunks a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.train_parts import (
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
def linear_states(
    K, V, LR, NORM_W, NORM_B, SCALE, W, B, G, Z, KEPT_W, KEPT_B, END_W, END_B, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, EVERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chain of W: gradients ``G``, outputs ``Z`` at the keys, W at the start of each group and at the end."""
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    square = column[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    w, b = tl.load(W + bh * D * D + square).to(tl.float32), tl.load(B + bh * D + column).to(tl.float32)
    groups = (N + EVERY - 1) // EVERY
    for chunk in range(N):
        if chunk % EVERY == 0:
            kept = bh * groups + chunk // EVERY
            tl.store(KEPT_W + kept * D * D + square, w)
            tl.store(KEPT_B + kept * D + column, b)
        token = chunk * C + slot
        inside = (token < T)[:, None]
        at = (row * T + token) * H + head
        place = at[:, None] * D + column[None, :]
        k = rows_of(K, place, inside)
        rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
        z = product(k, w, PRECISION) + b[None, :]
        g = loss_gradient(z, rows_of(V, place, inside) - k, norm_w, norm_b, eps, D) * rate
        tl.store(Z + place, z, mask=inside)
        tl.store(G + place, g, mask=inside)
        scale = tl.load(SCALE + row * N + chunk)
        w -= scale * product(tl.trans(k), g, PRECISION)
        b -= scale * tl.sum(g, 0)
    tl.store(END_W + bh * D * D + square, w)
    tl.store(END_B + bh * D + column, b)


@triton.jit
def linear_outputs(
    Q, K, G, NORM_W, NORM_B, TOKEN_SCALE, SCALE, KEPT_W, KEPT_B, Y, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, EVERY: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs ``Y`` of a group of chunks."""
    bh, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    kept = bh * ((N + EVERY - 1) // EVERY) + group
    w = tl.load(KEPT_W + kept * D * D + column[:, None] * D + column[None, :])
    b = tl.load(KEPT_B + kept * D + column)
    for chunk in range(group * EVERY, min(group * EVERY + EVERY, N)):
        token = chunk * C + slot
        inside = (token < T)[:, None]
        place = ((row * T + token) * H + head)[:, None] * D + column[None, :]
        q, k, g = rows_of(Q, place, inside), rows_of(K, place, inside), rows_of(G, place, inside)
        affinity = token_scale * visible(product(q, tl.trans(k), PRECISION) + 1, C, CAUSAL)
        z = product(q, w, PRECISION) + b[None, :] - product(affinity, g, PRECISION)
        n, _ = normalized(z, eps, D)
        tl.store(Y + place, (q + n * norm_w + norm_b).to(Y.dtype.element_ty), mask=inside)
        if EVERY > 1:
            scale = tl.load(SCALE + row * N + chunk)
            w -= scale * product(tl.trans(k), g, PRECISION)
            b -= scale * tl.sum(g, 0)


@triton.jit
def linear_output_gradients(
    Q, K, G, DY, NORM_W, NORM_B, TOKEN_SCALE, SCALE, KEPT_W, KEPT_B, DZ_QUERY, DQ, DK, DG, D_TOKEN_SCALE, D_NORM_W,
    D_NORM_B, T, H, N, eps,
    C: tl.constexpr, D: tl.constexpr, EVERY: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The way back from the outputs: all of ``DQ``, the queries' part of ``DK`` and ``DG``, z's at the queries.

    ``D_TOKEN_SCALE [B, H, groups, C]``, ``D_NORM_W`` and ``D_NORM_B [B, H, groups, D]``: this group's part.
    """
    bh, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    norm_w = tl.load(NORM_W + head * D + column)[None, :]
    token_scale = tl.load(TOKEN_SCALE + slot)[:, None]
    kept = bh * ((N + EVERY - 1) // EVERY) + group
    w = tl.load(KEPT_W + kept * D * D + column[:, None] * D + column[None, :])
    b = tl.load(KEPT_B + kept * D + column)
    d_norm_w, d_norm_b = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    d_token_scale = tl.zeros([C], tl.float32)
    for chunk in range(group * EVERY, min(group * EVERY + EVERY, N)):
        token = chunk * C + slot
        inside = (token < T)[:, None]
        place = ((row * T + token) * H + head)[:, None] * D + column[None, :]
        q, k, g = rows_of(Q, place, inside), rows_of(K, place, inside), rows_of(G, place, inside)
        dy = rows_of(DY, place, inside)
        affinity = visible(product(q, tl.trans(k), PRECISION) + 1, C, CAUSAL)
        z = product(q, w, PRECISION) + b[None, :] - product(token_scale * affinity, g, PRECISION)
        n, r = normalized(z, eps, D)
        dz = norm_backward(dy * norm_w, n, r, D)
        d_norm_w += tl.sum(dy * n, 0)
        d_norm_b += tl.sum(dy, 0)
        d_affinity = -visible(product(dz, tl.trans(g), PRECISION), C, CAUSAL)
        d_token_scale += tl.sum(d_affinity * affinity, 1)
        d_affinity *= token_scale
        tl.store(DZ_QUERY + place, dz, mask=inside)
        dq = dy + product(dz, tl.trans(w), PRECISION) + product(d_affinity, k, PRECISION)
        tl.store(DQ + place, dq.to(DQ.dtype.element_ty), mask=inside)
        tl.store(DK + place, product(tl.trans(d_affinity), q, PRECISION), mask=inside)
        tl.store(DG + place, -product(tl.trans(token_scale * affinity), dz, PRECISION), mask=inside)
        if EVERY > 1:
            scale = tl.load(SCALE + row * N + chunk)
            w -= scale * product(tl.trans(k), g, PRECISION)
            b -= scale * tl.sum(g, 0)
    tl.store(D_TOKEN_SCALE + kept * C + slot, d_token_scale)
    tl.store(D_NORM_W + kept * D + column, d_norm_w)
    tl.store(D_NORM_B + kept * D + column, d_norm_b)


@triton.jit
def linear_state_gradients(
    Q, K, V, LR, G, Z, NORM_W, NORM_B, SCALE, DZ_QUERY, DG, DW_END, DB_END, DZ, DK, DV, D_LR, D_SCALE, DW, DB,
    D_NORM_W, D_NORM_B, T, H, N, eps, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The chain of W's gradient, from the last chunk to the first, and what needs it.

    ``DK`` is added to, but for what comes through z at the keys, whose gradient is ``DZ``. ``D_SCALE [B, H, N]``.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    square = column[:, None] * D + column[None, :]
    norm_w, norm_b = tl.load(NORM_W + head * D + column)[None, :], tl.load(NORM_B + head * D + column)[None, :]
    dw, db = tl.load(DW_END + bh * D * D + square), tl.load(DB_END + bh * D + column)
    d_norm_w, d_norm_b = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for step in range(N):
        chunk = N - 1 - step
        token = chunk * C + slot
        inside = (token < T)[:, None]
        at = (row * T + token) * H + head
        place = at[:, None] * D + column[None, :]
        k, g = rows_of(K, place, inside), rows_of(G, place, inside)
        rate = tl.load(LR + at, mask=token < T, other=0.0).to(tl.float32)[:, None]
        scale = tl.load(SCALE + row * N + chunk)
        through = product(k, dw, PRECISION) + db[None, :]
        tl.store(D_SCALE + bh * N + chunk, -tl.sum(g * through))
        dg = rows_of(DG, place, inside) - scale * through
        dk = rows_of(DK, place, inside) - scale * product(g, tl.trans(dw), PRECISION)
        z, target = rows_of(Z, place, inside), rows_of(V, place, inside) - k
        unscaled = loss_gradient(z, target, norm_w, norm_b, eps, D)
        tl.store(D_LR + at, tl.sum(dg * unscaled, 1), mask=token < T)
        dz, du, for_w, for_b = loss_gradient_backward(rate * dg, z, target, norm_w, norm_b, eps, D)
        d_norm_w += for_w
        d_norm_b += for_b
        tl.store(DV + place, (-du * norm_w).to(DV.dtype.element_ty), mask=inside)
        tl.store(DK + place, dk + du * norm_w, mask=inside)
        tl.store(DZ + place, dz, mask=inside)
        dz_query = rows_of(DZ_QUERY, place, inside)
        dw += product(tl.trans(k), dz, PRECISION)
        dw += product(tl.trans(rows_of(Q, place, inside)), dz_query, PRECISION)
        db += tl.sum(dz, 0) + tl.sum(dz_query, 0)
    tl.store(DW + bh * D * D + square, dw)
    tl.store(DB + bh * D + column, db)
    tl.store(D_NORM_W + bh * D + column, d_norm_w)
    tl.store(D_NORM_B + bh * D + column, d_norm_b)


@triton.jit
def linear_key_gradients(
    K, G, DZ, SCALE, KEPT_W, DK, T, H, N,
    C: tl.constexpr, D: tl.constexpr, EVERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What comes to the keys through z, added to ``DK``."""
    bh, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = bh // H, bh % H
    slot, column = tl.arange(0, C), tl.arange(0, D)
    kept = bh * ((N + EVERY - 1) // EVERY) + group
    w = tl.load(KEPT_W + kept * D * D + column[:, None] * D + column[None, :])
    for chunk in range(group * EVERY, min(group * EVERY + EVERY, N)):
        token = chunk * C + slot
        inside = (token < T)[:, None]
        place = ((row * T + token) * H + head)[:, None] * D + column[None, :]
        dk = rows_of(DK, place, inside) + product(rows_of(DZ, place, inside), tl.trans(w), PRECISION)
        tl.store(DK + place, dk, mask=inside)
        if EVERY > 1:
            k, g = rows_of(K, place, inside), rows_of(G, place, inside)
            w -= tl.load(SCALE + row * N + chunk) * product(tl.trans(k), g, PRECISION)
