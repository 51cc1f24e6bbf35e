"""What the training kernels share: products, the inner LayerNorm with its derivatives, gelu, loads of a chunk.

Everything is computed in float32, whatever the inputs' dtype. ``PRECISION`` says how matrices are multiplied: one of
tl.dot's names (``ieee``, ``tf32x3``, ``bf16x3``, ``tf32``), or ``bf16``, which rounds both factors to bfloat16
(``bf16_interpreted``: the same in Triton's interpreter).

Shape legend: C tokens a chunk, D head width, F hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"


@triton.jit
def nearest_bfloat16(x):
    """``x``, in float32, rounded to the nearest bfloat16 (of two, the even one); a NaN stays one.

    In the interpreter, which cuts bits off where a GPU rounds.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b`` with float32 sums."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "bf16_interpreted":
        return tl.dot(nearest_bfloat16(a), nearest_bfloat16(b), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rows_of(pointer, offsets, inside):
    """Rows ``[C, D]`` in float32, zero where not ``inside [C, 1]``."""
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalized(z, eps, D: tl.constexpr):
    """``z [C, D]`` with mean 0 and variance 1 over D, and one over its standard deviation, ``[C, 1]``."""
    centered = z - tl.sum(z, 1)[:, None] / D
    r = 1 / tl.sqrt(tl.sum(centered * centered, 1)[:, None] / D + eps)
    return centered * r, r


@triton.jit
def loss_gradient(z, target, weight, bias, eps, D: tl.constexpr):
    """d/dz of 1/2 || LN(z) - target ||^2, ``[C, D]``; ``weight`` and ``bias [1, D]``."""
    n, r = normalized(z, eps, D)
    u = (n * weight + bias - target) * weight
    return r * (u - tl.sum(u, 1)[:, None] / D - n * (tl.sum(u * n, 1)[:, None] / D))


@triton.jit
def key_gradient(z, v, k, rate, weight, bias, eps, D: tl.constexpr, GIVEN: tl.constexpr):
    """The gradient g ``[C, D]`` of the last layer's output at the keys: the loss's, times ``rate [C, 1]``.

    ``GIVEN``: where a rate is below 0, g is ``v`` itself: that of a token from before the call.
    """
    g = loss_gradient(z, v - k, weight, bias, eps, D) * rate
    if GIVEN:
        g = tl.where(rate < 0, v, g)
    return g


@triton.jit
def norm_backward(dn, n, r, D: tl.constexpr):
    """The gradient of z, for ``n, r = normalized(z)`` and the gradient ``dn`` of n."""
    return r * (dn - tl.sum(dn, 1)[:, None] / D - n * (tl.sum(dn * n, 1)[:, None] / D))


@triton.jit
def loss_gradient_backward(p, z, target, weight, bias, eps, D: tl.constexpr):
    """The way back through ``loss_gradient``, of ``p [C, D]``, the gradient of what it gives.

    Returns dz and -d(target) / weight, both ``[C, D]``, then ``[D]``, the sums for weight and bias.
    """
    n, r = normalized(z, eps, D)
    error = n * weight + bias - target
    u = error * weight
    along = tl.sum(u * n, 1)[:, None] / D
    h = u - tl.sum(u, 1)[:, None] / D - n * along
    dh = r * p
    dh_along = tl.sum(dh * n, 1)[:, None] / D
    du = dh - tl.sum(dh, 1)[:, None] / D - n * dh_along
    dn = du * weight * weight - along * dh - u * dh_along
    dz = norm_backward(dn, n, r, D) - r * r * n * (tl.sum(p * h, 1)[:, None] / D)
    return dz, du, tl.sum(du * (error + n * weight), 0), tl.sum(du * weight, 0)


@triton.jit
def gelu(x):
    """The tanh form."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_slope(x):
    """The derivative of ``gelu``."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def gelu_curvature(x):
    """The second derivative of ``gelu``: with s(x) = sigmoid(v), 2 s' + x s''."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1 + 0.134145 * x * x)  # v'
    bend = 1.5957691216057308 * 0.26829 * x  # v''
    return s * (1 - s) * (2 * slope + x * (bend + (1 - 2 * s) * slope * slope))


@triton.jit
def visible(matrix, C: tl.constexpr, CAUSAL: tl.constexpr):
    """``matrix [C, C]`` (query, key) where a query may use a key, and zero elsewhere."""
    if CAUSAL:
        slot = tl.arange(0, C)
        return tl.where(slot[:, None] >= slot[None, :], matrix, 0.0)
    else:
        return matrix
