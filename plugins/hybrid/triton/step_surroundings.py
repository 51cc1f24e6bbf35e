"""What is around the inner loop of one streamed token: from projections to its tokens, and from y to the output.

    prepare   projections q, k, v of x -> q, k, v' and lr (L2 norm, rotary embedding, target, rate), the token scale
    look      what ``prepare`` finds out about tokens, of those that are given
    norm      y -> the post norm of y, in the dtype of the output projection
    gate      x + volume * tanh(alpha) * that projection

``layer.py`` has the formulas; all of them are computed in float32.

Shape legend: B rows, H heads, D head width, N width of the host (H D), C tokens a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moshi_ttt.plugins.hybrid.triton.step_parts import vector, vector_where

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def inside_chunk(POSITION, row, C: tl.constexpr):
    """The row's position. One that lies outside the chunk, where nothing may be written, is the nearest inside."""
    return tl.minimum(tl.maximum(tl.load(POSITION + row), 0), C - 1)


@triton.jit
def cos_and_sin(angle):
    """Of an ``angle`` up to some thousands, to the last digits: by the series around the nearest quarter of a turn."""
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)
    x = (wide - quarter * 1.5707963267948966).to(tl.float32)
    s = x * x
    cos = 1 - s * (1 / 2 - s * (1 / 24 - s * (1 / 720 - s * (1 / 40320 - s / 3628800))))
    sin = x * (1 - s * (1 / 6 - s * (1 / 120 - s * (1 / 5040 - s / 362880))))
    turned = quarter.to(tl.int32) & 3
    other_cos = tl.where(turned % 2 == 0, cos, sin)
    other_sin = tl.where(turned % 2 == 0, sin, cos)
    return (
        tl.where((turned == 1) | (turned == 2), -other_cos, other_cos),
        tl.where(turned >= 2, -other_sin, other_sin),
    )


@triton.jit
def rotated(POINTER, position, log2_theta, pair, inside, D: tl.constexpr):
    """The vector ``[D]`` over its length, rotated: its even and its odd elements, ``[D / 2]`` each."""
    even = tl.load(POINTER + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(POINTER + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(even * even + odd * odd, 0))
    length = tl.where(length > 0, tl.maximum(length, 1e-12), 1.0)
    even, odd = even / length, odd / length
    # theta^(-2 i / D) in float64: an error of the frequency is multiplied by the position
    frequency = tl.exp2(-(2 * pair).to(tl.float64) / D * log2_theta).to(tl.float32)
    angle = position.to(tl.float32) * frequency
    cos, sin = cos_and_sin(angle)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def rate_of(X, LR_W, row, head, limit, N: tl.constexpr, BN: tl.constexpr):
    """w_h . x of a head, and whether all of x is below ``limit``."""
    total, ok = tl.zeros([BN], tl.float32), tl.full([BN], 1, tl.int32)
    for start in range(0, N, BN):
        index = start + tl.arange(0, BN)
        x = vector(X + row * N, index, N)
        ok = tl.where(tl.abs(x) < limit, ok, 0)
        total += x * vector(LR_W + head * N, index, N)
    return tl.sum(total, 0), tl.min(ok, 0)


@triton.jit
def prepare(
    X, Q, K, V, GIVEN, UPDATED, ACTIVE, POSITION, SPOILED, LR_W, LR_B, NORM_W, NORM_B, OFFSET, TO_Q, TO_K, TO_V,
    TO_LR, OK, NOW, SCALE, base_rate, factor, log2_theta, eps, limit,
    H: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """One program for each row and head: ``TO_Q``, ``TO_K``, ``TO_V [B, H, D]``, ``TO_LR`` and ``OK [B, H]``.

    Also ``NOW [B, 2]`` and ``SCALE [C]``. ``GIVEN [B]``, or None: rows whose token may enter, apart from x.
    """
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // H, bh % H
    if bh == 0:
        slot = tl.arange(0, BC)
        scale = tl.maximum(1 / (slot + 1).to(tl.float32) + vector(OFFSET, slot, C), 0.0)
        tl.store(SCALE + slot, scale, mask=slot < C)
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    position = inside_chunk(POSITION, row, C)
    if head == 0:
        tl.store(NOW + 2 * row, position)
        tl.store(NOW + 2 * row + 1, tl.load(SPOILED + row))
    pair = tl.arange(0, BP)
    inside = pair < D // 2
    q_even, q_odd = rotated(Q + bh * D, position, log2_theta, pair, inside, D)
    k_even, k_odd = rotated(K + bh * D, position, log2_theta, pair, inside, D)
    even = tl.load(V + bh * D + 2 * pair, mask=inside, other=0.0).to(tl.float32) - k_even
    odd = tl.load(V + bh * D + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32) - k_odd
    mean = tl.sum(even + odd, 0) / D
    even, odd = tl.where(inside, even - mean, 0.0), tl.where(inside, odd - mean, 0.0)
    std = tl.sqrt(tl.sum(even * even + odd * odd, 0) / (D - 1))
    std = tl.where(std > 0, std + eps, 1.0)
    at = head * D + 2 * pair
    w_even, w_odd = vector_where(inside, NORM_W, at, H * D), vector_where(inside, NORM_W + 1, at, H * D)
    b_even, b_odd = vector_where(inside, NORM_B, at, H * D), vector_where(inside, NORM_B + 1, at, H * D)
    v_even, v_odd = w_even * even / std + b_even + k_even, w_odd * odd / std + b_odd + k_odd
    product, ok = rate_of(X, LR_W, row, head, limit, N, BN)
    lr = factor * (base_rate * tl.sigmoid(product + tl.load(LR_B + head).to(tl.float32)))
    if UPDATED is not None:
        lr = tl.where(tl.load(UPDATED + row) != 0, lr, 0.0)
    if GIVEN is not None:
        ok = tl.where(tl.load(GIVEN + row) != 0, ok, 0)
    below = (tl.abs(q_even) < limit) & (tl.abs(q_odd) < limit) & (tl.abs(k_even) < limit) & (tl.abs(k_odd) < limit)
    below = below & (tl.abs(v_even) < limit) & (tl.abs(v_odd) < limit)
    ok = tl.where(tl.abs(lr) < limit, ok, 0)
    tl.store(OK + bh, tl.minimum(ok, tl.min(below.to(tl.int32), 0)))
    place = bh * D + 2 * pair
    tl.store(TO_Q + place, q_even, mask=inside)
    tl.store(TO_Q + place + 1, q_odd, mask=inside)
    tl.store(TO_K + place, k_even, mask=inside)
    tl.store(TO_K + place + 1, k_odd, mask=inside)
    tl.store(TO_V + place, v_even, mask=inside)
    tl.store(TO_V + place + 1, v_odd, mask=inside)
    tl.store(TO_LR + bh, lr)


@triton.jit
def look(
    Q, K, V, LR, ACTIVE, POSITION, SPOILED, OK, NOW, limit,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One program for each row and head: ``OK [B, H]`` and ``NOW [B, 2]`` of q, k, v and lr that are given."""
    bh = tl.program_id(0).to(tl.int64)
    row, column = bh // H, tl.arange(0, BD)
    if ACTIVE is not None:
        if tl.load(ACTIVE + row) == 0:
            return
    if bh % H == 0:
        tl.store(NOW + 2 * row, inside_chunk(POSITION, row, C))
        tl.store(NOW + 2 * row + 1, tl.load(SPOILED + row))
    below = tl.abs(vector(Q + bh * D, column, D)) < limit
    below = below & (tl.abs(vector(K + bh * D, column, D)) < limit)
    below = below & (tl.abs(vector(V + bh * D, column, D)) < limit)
    ok = tl.min(below.to(tl.int32), 0)
    tl.store(OK + bh, tl.where(tl.abs(tl.load(LR + bh).to(tl.float32)) < limit, ok, 0))


@triton.jit
def norm(Y, WEIGHT, BIAS, TO, eps, N: tl.constexpr, BN: tl.constexpr):
    """One program for each row of ``Y [B, N]``: its LayerNorm, into ``TO [B, N]``."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    y = vector(Y + row * N, column, N)
    centered = tl.where(column < N, y - tl.sum(y, 0) / N, 0.0)
    r = 1 / tl.sqrt(tl.sum(centered * centered, 0) / N + eps)
    found = centered * r * vector(WEIGHT, column, N) + vector(BIAS, column, N)
    tl.store(TO + row * N + column, found.to(TO.dtype.element_ty), mask=column < N)


@triton.jit
def tanh(x):
    """Also of a small x to the last digits, and 0 of 0: a gate of 0 adds nothing."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    return tl.where(square < 0.04, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def gate(
    X, ADDED, GATE, VOLUME, volume, TO, N: tl.constexpr, BN: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """``x + volume * tanh(gate) * added`` of a row and ``BN`` channels; x itself where the volume is 0.

    ``VOLUME [B]``, or None for the number ``volume``. ``ONE``: the gate is ``[1]``, else ``[N]``.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < N
    if VOLUME is not None:
        volume = tl.load(VOLUME + row).to(tl.float32)
    x = tl.load(X + row * N + column, mask=inside, other=0.0)
    if ONE:
        alpha = tl.load(GATE).to(tl.float32)
    else:
        alpha = vector(GATE, column, N)
    total = x.to(tl.float32) + volume * (tanh(alpha) * vector(ADDED + row * N, column, N))
    tl.store(TO + row * N + column, tl.where(volume == 0, x, total.to(x.dtype)), mask=inside)
