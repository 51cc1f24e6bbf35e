"""The layer around the memory of ``ttt_ridge``: queries, keys, values and write strengths, and what is added.

    xn  = x / rms(x);  z = W_qk xn + b_qk
    q_t = normalized features of sum over j of cq_j z_(t-j),  k_t the same with ck_j     (per head; j = 0 .. K - 1)
    v_t = W_v e_t / rms(e_t)                             e: the host's input embeddings (or x)
    b_t = sigmoid(w . xn_t + b)                          (per head)
    y   = x + tanh(alpha) * (W_o (scale * g_t o_t) + b_o)

with o what the memory reads and g its gates. At the start cq is one at lag 0 and ck at lag 1: the memory learns which
value follows which frame.

Shape legend: B streams, T tokens, D width, H heads, m key width, d value width, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.block import SiteInfo
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.plugins.common import short_conv
from moshi_ttt.plugins.common.finite import below, largest_factor
from moshi_ttt.plugins.common.normalization import l2_normalize
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.ttt_ridge.config import TTTRidgeConfig
from moshi_ttt.plugins.ttt_ridge.memory import RidgeTokens

RMS_EPS = 1e-6
HEAD_WIDTH = 128
"""Channels of the host for each head, where the options give no number of heads."""


def widths(config: TTTRidgeConfig, info: SiteInfo) -> tuple[int, int, int]:
    """Heads, key width and value width. Raises ConfigError where the host's width is no multiple of the heads."""
    heads = config.heads or max(1, info.dim // HEAD_WIDTH)
    width, remainder = divmod(info.dim, heads)
    if remainder and None in (config.key_width, config.value_width):
        raise ConfigError(
            f"{info.site}: width {info.dim} over {heads} heads is not whole. Set heads to a divisor of {info.dim}, or "
            "give key_width and value_width."
        )
    return heads, config.key_width or width, config.value_width or width


@dataclass
class LayerWeights:
    """What the projections need.

    Attributes:
        qk: ``[H m, D]`` with bias, of queries and keys.
        conv_q, conv_k: taps ``[H m, K]``, lag j at j.
        value: ``[H d, D]``.
        write: ``[H, D]`` with bias ``[H]``.
        heads: H.
        relu2: whether the features are max(0, z)^2.
    """

    qk: Linear
    conv_q: Tensor
    conv_k: Tensor
    value: Tensor
    write: Linear
    heads: int
    relu2: bool


def rms_normalized(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + 1e-6)`` over the last dimension of ``x [..., D]``."""
    return x * (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()


def finite_tokens(*given: Tensor) -> Tensor:
    """``[B, T]`` bool: tokens whose every number, in each of ``[B, T, D]``, is finite and whose squares are."""
    with torch.no_grad():
        found = [below(x, largest_factor(torch.promote_types(x.dtype, torch.float32))) for x in given]
        return torch.stack(found).all(0)


def inputs(
    x: Tensor, source: Tensor, cache: Tensor, finite: Tensor, updated: Tensor, weights: LayerWeights, roles: DtypeRoles
) -> tuple[RidgeTokens, Tensor, Tensor]:
    """What enters the memory, the convolution's cache after the call, and which tokens ``[B, T]`` stayed finite.

    Args:
        x: ``[B, T, D]``.
        source: what values are made of, ``[B, T, D]``.
        cache: ``[B, K - 1, H m]``, of z.
        finite: ``[B, T]`` bool: the others are taken for zeros and are not written.
        updated: ``[B or 1, 1 or T]`` bool: where test-time updates are enabled.
    """
    there = finite[..., None]  # [B, T] -> [B, T, 1]
    normal = rms_normalized(torch.where(there, x, 0).to(roles.compute))  # [B, T, D]
    known = normal if source is x else rms_normalized(torch.where(there, source, 0).to(roles.compute))  # [B, T, D]
    z = weights.qk(normal, roles.matmul).to(roles.compute)
    v = F.linear(known.to(roles.matmul), weights.value.to(roles.matmul)).to(roles.compute)
    if roles.matmul == torch.float16:  # others hold a projection of whatever is normalized
        with torch.no_grad():
            finite = finite & below(z, torch.inf) & below(v, torch.inf)
        z, v = (torch.where(finite[..., None], part, 0) for part in (z, v))  # [B, T, 1] over [B, T, any]
    # A token that is not finite counts as zero in the filters, without its bias: the next key is made of it.
    q, _ = short_conv.convolve(z, weights.conv_q, cache, finite)
    k, cache = short_conv.convolve(z, weights.conv_k, cache, finite)
    if weights.relu2:
        q, k = F.relu(q).square(), F.relu(k).square()
    # [B, T, H m] -> [B, T, H, m]
    q, k = (l2_normalize(part.unflatten(-1, (weights.heads, -1)), exact=True) for part in (q, k))
    strength = torch.sigmoid(weights.write(normal, roles.compute))
    v = v.unflatten(-1, (weights.heads, -1))  # [B, T, H d] -> [B, T, H, d]
    q, k, v, strength = (part.to(roles.state) for part in (q, k, v, strength))
    return RidgeTokens(q, k, v, strength, finite & updated), cache, finite
