"""What is around the inner loop of a training call: from projections to its tokens, from its outputs to the block's.

    token_mask      x with zeros for tokens that may not enter, and which may
    tokens          projections of x -> q, k, v' and lr (L2 norm, rotary embedding, target, rate)
    token_gradients the way back
    post_norm       the LayerNorm of the inner loop's outputs
    norm_gradients  the way back
    gated           x + volume * tanh(alpha) * added
    gate_gradients  the way back, but for x, whose gradient is that of the output

``layer.py`` has the formulas; all of them are computed in float32. The inner loop's tensors are of slots, in whole
chunks: a call that continues a chunk begins in its middle, row by row. A program has ``BT`` tokens or slots at a time,
and ``EACH`` in all where it adds up gradients of parameters. Flags are bytes, 0 or 1.

Shape legend: B rows, T tokens, C tokens a chunk, H heads, D head width, N width of the host (H D), P programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.step_parts import vector
from moshi_ttt.plugins.hybrid.triton.step_surroundings import cos_and_sin, tanh

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def token_mask(X, TO, FINITE, limit, N: tl.constexpr, BN: tl.constexpr):
    """``TO``: a token of ``X [B, T, N]``, zero unless all of it is below ``limit``. ``FINITE [B, T]``: if it is."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    x = tl.load(X + token * N + column, mask=column < N, other=0.0)
    finite = tl.min(tl.where(tl.abs(x.to(tl.float32)) < limit, 1, 0), 0)
    tl.store(TO + token * N + column, tl.where(finite != 0, x, 0.0), mask=column < N)
    tl.store(FINITE + token, finite)


@triton.jit
def pairs_of(POINTER, place, inside):
    """The even and the odd elements of tokens, in float32, at ``place``, where the even ones are."""
    even = tl.load(POINTER + place, mask=inside, other=0.0).to(tl.float32)
    return even, tl.load(POINTER + place + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_pairs(POINTER, place, inside, even, odd):
    tl.store(POINTER + place, even.to(POINTER.dtype.element_ty), mask=inside)
    tl.store(POINTER + place + 1, odd.to(POINTER.dtype.element_ty), mask=inside)


@triton.jit
def turn_of(position, log2_theta, pair, D: tl.constexpr):
    """cos and sin ``[n, 1, D / 2]`` of the rotation of tokens at ``position [n]`` in their chunk."""
    # theta^(-2 i / D) in float64: an error of the frequency is multiplied by the position
    frequency = tl.exp2(-(2 * pair).to(tl.float64) / D * log2_theta).to(tl.float32)
    return cos_and_sin(position.to(tl.float32)[:, None, None] * frequency)


@triton.jit
def along(even, odd):
    """The sum over D of two ``[n, H, D / 2]``, as ``[n, H, 1]``."""
    return tl.sum(even + odd, 2)[:, :, None]


@triton.jit
def length_of(even, odd):
    """The length of each vector, ``[n, H, 1]``: what it is divided by, and whether that is the length itself."""
    length = tl.sqrt(along(even * even, odd * odd))
    return tl.where(length > 0, tl.maximum(length, 1e-12), 1.0), length > 1e-12


@triton.jit
def deviation_of(v_even, v_odd, k_even, k_odd, inside, eps, D: tl.constexpr):
    """v - k without its mean, ``[n, H, D / 2]``; its standard deviation and what it is divided by, ``[n, H, 1]``."""
    even, odd = v_even - k_even, v_odd - k_odd
    mean = along(even, odd) / D
    even, odd = tl.where(inside, even - mean, 0.0), tl.where(inside, odd - mean, 0.0)
    std = tl.sqrt(along(even * even, odd * odd) / (D - 1))
    return even, odd, std, tl.where(std > 0, std + eps, 1.0)


@triton.jit
def turned(POINTER, place, inside, cos, sin):
    """A vector over its length, and rotated: its even and its odd elements, ``[n, H, D / 2]`` each."""
    even, odd = pairs_of(POINTER, place, inside)
    length, _ = length_of(even, odd)
    even, odd = even / length, odd / length
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def turned_back(d_even, d_odd, even, odd, cos, sin):
    """The gradient of a vector, from that of it over its length and rotated: all ``[n, H, D / 2]``."""
    length, itself = length_of(even, odd)
    even, odd = even / length, odd / length
    back_even, back_odd = d_even * cos + d_odd * sin, d_odd * cos - d_even * sin
    radial = tl.where(itself, along(even * back_even, odd * back_odd), 0.0)
    return (back_even - even * radial) / length, (back_odd - odd * radial) / length


@triton.jit
def all_below(even, odd, inside, limit):
    """``[n]``, whether all of two ``[n, H, any]`` is below ``limit``, as a number."""
    below = (tl.abs(even) < limit) & (tl.abs(odd) < limit)
    return tl.min(tl.min(tl.where(below | (inside == 0), 1, 0), 2), 1)


@triton.jit
def slots_of(POSITION, first, COUNT, T, SLOTS, n: tl.constexpr, CONTINUED: tl.constexpr):
    """Slots ``first`` and those after it, of ``COUNT`` in all rows, ``[n]`` each: which, their row, their slot in it.

    And which token of the row lies there, and whether one does. A row begins at slot ``POSITION [B]`` where the call is
    ``CONTINUED``, else at 0.
    """
    index = first + tl.arange(0, n)
    row = tl.minimum(index, COUNT - 1) // SLOTS
    slot = index - row * SLOTS
    time = slot
    if CONTINUED:
        time -= tl.load(POSITION + row)
    return index, row, slot, time, (time >= 0) & (time < T) & (index < COUNT)


@triton.jit
def tokens(
    Q, K, V, RATE, FINITE, UPDATED, NORM_W, NORM_B, POSITION, EARLIER_K, EARLIER_G, TO_Q, TO_K, TO_V, TO_LR, OK, COUNT,
    T, SLOTS, base_rate, factor, log2_theta, eps, limit,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, ALL: tl.constexpr,
    CONTINUED: tl.constexpr,
):  # fmt: skip
    """Of ``BT`` slots ``TO_Q``, ``TO_K``, ``TO_V [B, slots, H, D]`` and ``TO_LR [B, slots, H]``, zero without a token.

    They are zero, and ``OK [B, slots]`` is, for a token that may not enter: unless it is ``FINITE`` and all that it
    gives is below ``limit``. ``UPDATED [B]``: rows whose rates are not zero; not read where ``ALL`` are updated.

    ``EARLIER_K`` and ``EARLIER_G [B, H, C, D]`` are put into slots before a row's first: they are k, and g as v, with a
    rate of -1 (``train_parts.key_gradient``). ``COUNT``: slots of all rows.
    """
    first = tl.program_id(0).to(tl.int64) * BT
    index, row, slot, time, exists = slots_of(POSITION, first, COUNT, T, SLOTS, BT, CONTINUED)
    head, pair = tl.arange(0, BH), tl.arange(0, D // 2)[None, None, :]
    inside, at = (head < H)[None, :, None] & (pair >= 0), head[None, :, None] * D + 2 * pair  # [1, H, D / 2]
    given, token = inside & exists[:, None, None], row * T + time
    place = token[:, None, None] * H * D + at
    cos, sin = turn_of(slot % C, log2_theta, pair, D)
    q_even, q_odd = turned(Q, place, given, cos, sin)
    k_even, k_odd = turned(K, place, given, cos, sin)
    v_even, v_odd = pairs_of(V, place, given)
    even, odd, _, divisor = deviation_of(v_even, v_odd, k_even, k_odd, inside, eps, D)
    w_even, w_odd = pairs_of(NORM_W, at, inside)
    b_even, b_odd = pairs_of(NORM_B, at, inside)
    v_even, v_odd = w_even * even / divisor + b_even + k_even, w_odd * odd / divisor + b_odd + k_odd
    mine = (head < H)[None, :] & exists[:, None]  # [BT, H]
    rate = tl.load(RATE + token[:, None] * H + head[None, :], mask=mine, other=0.0).to(tl.float32)
    lr = factor * (base_rate * tl.sigmoid(rate))
    if not ALL:
        lr = tl.where(tl.load(UPDATED + row)[:, None] != 0, lr, 0.0)
    ok = tl.load(FINITE + token, mask=exists, other=1).to(tl.int32)
    ok = ok * all_below(q_even, q_odd, inside, limit) * all_below(k_even, k_odd, inside, limit)
    ok = ok * all_below(v_even, v_odd, inside, limit) * tl.min(tl.where((tl.abs(lr) < limit) | (mine == 0), 1, 0), 1)
    ok = tl.where(exists, ok, 1)
    tl.store(OK + index, ok, mask=index < COUNT)
    kept = ((ok != 0) & exists)[:, None, None]
    q_even, q_odd = tl.where(kept, q_even, 0.0), tl.where(kept, q_odd, 0.0)
    k_even, k_odd = tl.where(kept, k_even, 0.0), tl.where(kept, k_odd, 0.0)
    v_even, v_odd = tl.where(kept, v_even, 0.0), tl.where(kept, v_odd, 0.0)
    lr = tl.where(((ok != 0) & exists)[:, None], lr, 0.0)
    if CONTINUED:
        before = (time < 0)[:, None, None]
        there = ((row[:, None] * H + head[None, :]) * C + slot[:, None])[:, :, None] * D + 2 * pair
        even, odd = pairs_of(EARLIER_K, there, inside & before)
        k_even, k_odd = tl.where(before, even, k_even), tl.where(before, odd, k_odd)
        even, odd = pairs_of(EARLIER_G, there, inside & before)
        v_even, v_odd = tl.where(before, even, v_even), tl.where(before, odd, v_odd)
        lr = tl.where((time < 0)[:, None], -1.0, lr)
    written = inside & (index < COUNT)[:, None, None]
    place = index[:, None, None] * H * D + at
    store_pairs(TO_Q, place, written, q_even, q_odd)
    store_pairs(TO_K, place, written, k_even, k_odd)
    store_pairs(TO_V, place, written, v_even, v_odd)
    tl.store(TO_LR + index[:, None] * H + head[None, :], lr, mask=(head < H)[None, :] & (index < COUNT)[:, None])


@triton.jit
def token_gradients(
    Q, K, V, RATE, OK, UPDATED, NORM_W, POSITION, D_Q, D_K, D_V, D_LR, TO_Q, TO_K, TO_V, TO_RATE, D_NORM_W, D_NORM_B,
    COUNT, T, SLOTS, base_rate, factor, log2_theta, eps,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, C: tl.constexpr, EACH: tl.constexpr, BT: tl.constexpr,
    ALL: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """From the gradients of ``tokens`` to those of q, k, v and the rate; zero for tokens that are not ``OK``.

    ``EACH`` slots a program, ``BT`` at a time. ``D_NORM_W`` and ``D_NORM_B [P, H, D]``: a program's part.
    """
    head, pair = tl.arange(0, BH), tl.arange(0, D // 2)[None, None, :]
    inside, at = (head < H)[None, :, None] & (pair >= 0), head[None, :, None] * D + 2 * pair  # [1, H, D / 2]
    w_even, w_odd = pairs_of(NORM_W, at, inside)
    dw_even, dw_odd = tl.zeros([1, BH, D // 2], tl.float32), tl.zeros([1, BH, D // 2], tl.float32)
    db_even, db_odd = tl.zeros([1, BH, D // 2], tl.float32), tl.zeros([1, BH, D // 2], tl.float32)
    for step in range(0, EACH, BT):
        first = tl.program_id(0).to(tl.int64) * EACH + step
        index, row, slot, time, exists = slots_of(POSITION, first, COUNT, T, SLOTS, BT, CONTINUED)
        ok = exists & (tl.load(OK + index, mask=exists, other=0) != 0)
        token, known = row * T + time, inside & ok[:, None, None]
        place, made = token[:, None, None] * H * D + at, inside & exists[:, None, None]
        from_slot = index[:, None, None] * H * D + at
        cos, sin = turn_of(slot % C, log2_theta, pair, D)
        k_even, k_odd = pairs_of(K, place, known)
        even, odd = turned(K, place, known, cos, sin)
        v_even, v_odd = pairs_of(V, place, known)
        even, odd, std, divisor = deviation_of(v_even, v_odd, even, odd, known, eps, D)
        d_even, d_odd = pairs_of(D_V, from_slot, known)
        dw_even += tl.sum(d_even * even / divisor, 0)[None, :, :]
        dw_odd += tl.sum(d_odd * odd / divisor, 0)[None, :, :]
        db_even += tl.sum(d_even, 0)[None, :, :]
        db_odd += tl.sum(d_odd, 0)[None, :, :]
        a_even, a_odd = d_even * w_even, d_odd * w_odd
        share = along(a_even * even, a_odd * odd) / (divisor * divisor)
        share = tl.where(std > 0, share / ((D - 1) * tl.where(std > 0, std, 1.0)), 0.0)
        a_even, a_odd = a_even / divisor - share * even, a_odd / divisor - share * odd
        mean = along(a_even, a_odd) / D
        a_even, a_odd = tl.where(known, a_even - mean, 0.0), tl.where(known, a_odd - mean, 0.0)
        store_pairs(TO_V, place, made, a_even, a_odd)
        g_even, g_odd = pairs_of(D_K, from_slot, known)
        g_even, g_odd = turned_back(g_even + d_even - a_even, g_odd + d_odd - a_odd, k_even, k_odd, cos, sin)
        store_pairs(TO_K, place, made, g_even, g_odd)
        q_even, q_odd = pairs_of(Q, place, known)
        g_even, g_odd = pairs_of(D_Q, from_slot, known)
        g_even, g_odd = turned_back(g_even, g_odd, q_even, q_odd, cos, sin)
        store_pairs(TO_Q, place, made, g_even, g_odd)
        mine, rates = (head < H)[None, :] & ok[:, None], token[:, None] * H + head[None, :]  # [BT, H]
        s = tl.sigmoid(tl.load(RATE + rates, mask=mine, other=0.0).to(tl.float32))
        rate = tl.load(D_LR + index[:, None] * H + head[None, :], mask=mine, other=0.0)
        rate = rate * factor * base_rate * s * (1 - s)
        if not ALL:
            rate = tl.where(tl.load(UPDATED + row)[:, None] != 0, rate, 0.0)
        tl.store(TO_RATE + rates, rate.to(TO_RATE.dtype.element_ty), mask=(head < H)[None, :] & exists[:, None])
    part = tl.program_id(0) * H * D + at
    store_pairs(D_NORM_W, part, inside, dw_even, dw_odd)
    store_pairs(D_NORM_B, part, inside, db_even, db_odd)


@triton.jit
def moments_of(y, known, eps, N: tl.constexpr):
    """``y [n, N]`` with mean 0 and variance 1, zero where not ``known``; 1 over its standard deviation ``[n, 1]``."""
    centered = tl.where(known, y - tl.sum(y, 1)[:, None] / N, 0.0)
    r = 1 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / N + eps)
    return centered * r, r


@triton.jit
def post_norm(
    Y, WEIGHT, BIAS, POSITION, OUT, COUNT, T, SLOTS, eps,
    N: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of ``BT`` slots of ``Y [B, slots, N]``, into their tokens of ``OUT [B, T, N]``."""
    first, column = tl.program_id(0).to(tl.int64) * BT, tl.arange(0, BN)
    index, row, _, time, exists = slots_of(POSITION, first, COUNT, T, SLOTS, BT, CONTINUED)
    known = (column < N)[None, :] & exists[:, None]  # [BT, N]
    y = tl.load(Y + index[:, None] * N + column[None, :], mask=known, other=0.0)
    n, _ = moments_of(y, known, eps, N)
    out = n * vector(WEIGHT, column, N)[None, :] + vector(BIAS, column, N)[None, :]
    tl.store(OUT + (row * T + time)[:, None] * N + column[None, :], out.to(OUT.dtype.element_ty), mask=known)


@triton.jit
def norm_gradients(
    Y, D_OUT, WEIGHT, POSITION, D_Y, D_WEIGHT, D_BIAS, COUNT, T, SLOTS, eps,
    N: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr, BT: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """The way back through ``post_norm``: ``D_Y`` is zero in slots without a token.

    ``EACH`` slots a program, ``BT`` at a time. ``D_WEIGHT`` and ``D_BIAS [P, N]``: a program's part.
    """
    column = tl.arange(0, BN)
    weight = vector(WEIGHT, column, N)[None, :]
    d_weight, d_bias = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    for step in range(0, EACH, BT):
        first = tl.program_id(0).to(tl.int64) * EACH + step
        index, row, _, time, exists = slots_of(POSITION, first, COUNT, T, SLOTS, BT, CONTINUED)
        known = (column < N)[None, :] & exists[:, None]  # [BT, N]
        place = index[:, None] * N + column[None, :]
        y = tl.load(Y + place, mask=known, other=0.0)
        d_out = tl.load(D_OUT + (row * T + time)[:, None] * N + column[None, :], mask=known, other=0.0).to(tl.float32)
        n, r = moments_of(y, known, eps, N)
        d = d_out * weight
        d_weight += tl.sum(d_out * n, 0)
        d_bias += tl.sum(d_out, 0)
        d_y = r * (d - tl.sum(d, 1)[:, None] / N - n * (tl.sum(d * n, 1)[:, None] / N))
        tl.store(D_Y + place, d_y, mask=(column < N)[None, :] & (index < COUNT)[:, None])
    part = tl.program_id(0).to(tl.int64) * N + column
    tl.store(D_WEIGHT + part, d_weight, mask=column < N)
    tl.store(D_BIAS + part, d_bias, mask=column < N)


@triton.jit
def alpha_of(GATE, column, N: tl.constexpr, ONE: tl.constexpr):
    """tanh of the gate at channels ``column``. ``ONE``: the gate is ``[1]``, else ``[N]``."""
    if ONE:
        alpha = tl.load(GATE + column * 0).to(tl.float32)
    else:
        alpha = vector(GATE, column, N)
    return tanh(alpha)


@triton.jit
def gated(
    X, ADDED, GATE, VOLUME, TO, T, volume, N: tl.constexpr, BN: tl.constexpr, ONE: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """``X + volume * tanh(gate) * ADDED`` of a token and ``BN`` channels; X itself where the volume is 0.

    ``VOLUME [B]`` is read where ``BY_ROW``; else the number ``volume``.
    """
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    place, inside = token * N + column, column < N
    if BY_ROW:
        volume = tl.load(VOLUME + token // T).to(tl.float32)
    x = tl.load(X + place, mask=inside, other=0.0)
    added = tl.load(ADDED + place, mask=inside, other=0.0).to(tl.float32)
    total = x.to(tl.float32) + volume * (alpha_of(GATE, column, N, ONE) * added)
    tl.store(TO + place, tl.where(volume == 0, x, total.to(x.dtype)), mask=inside)


@triton.jit
def gate_gradients(
    D_OUT, ADDED, GATE, VOLUME, D_ADDED, D_GATE, COUNT, T, volume,
    N: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr, ONE: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """The gradients of what is added, and of the gate: ``D_GATE [P, N]``, a program's part, also of a gate ``[1]``."""
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside, alpha = column < N, alpha_of(GATE, column, N, ONE)
    d_gate = tl.zeros([BN], tl.float32)
    for step in range(EACH):
        token = tl.program_id(0).to(tl.int64) * EACH + step
        if token < COUNT:
            if BY_ROW:
                factor = tl.load(VOLUME + token // T).to(tl.float32)
            else:
                factor = volume
            place = token * N + column
            d_out = factor * tl.load(D_OUT + place, mask=inside, other=0.0).to(tl.float32)
            added = tl.load(ADDED + place, mask=inside, other=0.0).to(tl.float32)
            d_gate += tl.where(factor == 0, 0.0, d_out * added)
            d_added = tl.where(factor == 0, 0.0, d_out * alpha)
            tl.store(D_ADDED + place, d_added.to(D_ADDED.dtype.element_ty), mask=inside)
    tl.store(D_GATE + tl.program_id(0).to(tl.int64) * N + column, d_gate * (1 - alpha * alpha), mask=inside)
