"""The layer around the inner loop: projections, normalisation, RoPE, target, post norm, gate.

The hybrid layer of Dalal et al. 2025 (arXiv:2504.05298), forward direction, on the un-normalised residual stream:

    q, k, v = projections of x, per head; q and k L2-normalised and rotated (position within the chunk)
    v'      = gamma * (v - k - mean) / (std + eps) + beta + k       (gamma, beta: the inner LayerNorm's)
    lr_t    = base_lr * sigmoid(w_h . x_t + b_h) / Dh
    y       = x + tanh(alpha) * (W_o LN(inner loop(q, k, v')) + b_o)

Options change three of these: a short causal convolution over time on the projected queries and keys, before they are
normalised (``short_conv``); v projected from e / rms(e), e the host's input embedding of the token; without the inner
LayerNorm, v' = v.

The functions here are pure: weights come as a ``HybridWeights``. The module that owns parameters is in ``block.py``.
The dataclasses that hold tensors are not frozen: torch.compile cannot trace frozen ones. Nothing writes to them.

Shape legend: B streams, T tokens, D width, H heads, Dh = D / H, C tokens a chunk, L layers of the fast network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.volume import at_volume
from moshi_ttt.plugins.common.finite import below
from moshi_ttt.plugins.common.inner_loop import Tokens
from moshi_ttt.plugins.common.objective import InnerNorm, Objective, PlainLoss
from moshi_ttt.plugins.common.rope import rotate


@dataclass
class Linear:
    """Weight ``[out, in]`` and bias ``[out]``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x W^T + b`` with inputs in ``dtype`` (products accumulate in float32, then round to ``dtype``)."""
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@dataclass
class HybridWeights:
    """Everything learned, except the fast network's initial weights.

    Attributes:
        wq, wk, wv, wo: ``[D, D]`` projections with bias.
        lr_weight, lr_bias: ``[H, 1, D]`` and ``[H, 1]``.
        norm_weight, norm_bias: ``[H, Dh]``, shared by the target and the inner LayerNorm; None without that.
        post_norm: weight and bias ``[D]``.
        token_scale: ``[C]``, as used (not the learned offset).
        gate: ``[D]``, before tanh.
    """

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    lr_weight: Tensor
    lr_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    post_norm: Linear
    token_scale: Tensor
    gate: Tensor


@dataclass(frozen=True, kw_only=True)
class HybridOptions:
    """The numbers that are not learned."""

    num_heads: int
    chunk_size: int
    base_lr: float
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    target_eps: float = 1e-8
    post_norm_eps: float = 1e-6


Mix = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""``(q, k, kept) -> (q, k)``: projected queries and keys ``[B, T, D]`` mixed over time; ``kept [B, T]`` or None."""


def l2_normalise(x: Tensor, exact: bool = False) -> Tensor:
    """``x / max(|x|, 1e-12)`` over the last dimension (the smallest normal number where a dtype has no 1e-12).

    A vector of zeros stays one, with gradient 1: the formula's own, 1e12, would swamp every other token's. ``exact``
    gives it a second derivative too, zero, where the norm's is nan.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    positive = norm > 0
    if exact:
        norm = torch.linalg.vector_norm(torch.where(positive, x, 1), dim=-1, keepdim=True)
    return x / torch.where(positive, norm.clamp(min=max(1e-12, torch.finfo(x.dtype).tiny)), 1)


def over_rms(e: Tensor, exact: bool = False) -> Tensor:
    """``e / rms(e)`` over the last dimension; a vector of zeros stays one. ``exact`` as in ``l2_normalise``."""
    return l2_normalise(e, exact) * math.sqrt(e.shape[-1])


def reconstruction_target(
    v: Tensor, k: Tensor, weight: Tensor, bias: Tensor, eps: float, exact: bool = False
) -> Tensor:
    """``weight * (v - k - mean) / (std + eps) + bias + k``, std unbiased (n - 1), over the last dimension.

    ``v`` and ``k`` are ``[B, T, H, Dh]``, ``weight`` and ``bias`` ``[H, Dh]``. A constant ``v - k`` is not divided by
    eps: it has nothing to normalise, and its gradient would be 1 / eps. ``exact`` as in ``l2_normalise``.
    """
    difference = v - k
    centred = difference - difference.mean(-1, keepdim=True)
    std = difference.std(-1, keepdim=True)
    positive = std > 0
    if exact:
        varied = torch.arange(difference.shape[-1], device=difference.device, dtype=difference.dtype)
        std = torch.where(positive, difference, varied).std(-1, keepdim=True)
    return weight * centred / torch.where(positive, std + max(eps, torch.finfo(std.dtype).tiny), 1) + bias + k


def inner_inputs(
    x: Tensor,
    position: Tensor,
    weights: HybridWeights,
    options: HybridOptions,
    roles: DtypeRoles,
    exact: bool = False,
    *,
    source: Tensor | None = None,
    mix: Mix | None = None,
) -> Tokens:
    """What enters the inner loop, token by token, in the state's dtype.

    Args:
        x: ``[B, T, D]``.
        position: ``[B or 1, T]``, each token's position in its chunk, or ``[1, T, A]``, where it is on a grid.
        exact: as in ``l2_normalise``.
        source: ``[B, T, D]``, what values are projected from; None: ``x``.
        mix: what queries and keys go through between projection and normalisation; it is told which tokens overflow.

    Returns:
        q, k, v and lr; v is what the objective takes: v', or without an inner LayerNorm the value itself. It is nan
        where a projection overflows: the inner loop leaves such a token out.
    """
    sources = (x, x, x if source is None else source)
    projections = (weights.wq, weights.wk, weights.wv)
    projected = [projection(part, roles.matmul) for projection, part in zip(projections, sources, strict=True)]
    overflows = None
    if roles.matmul == torch.float16:  # others hold a projection of whatever the block lets through
        with torch.no_grad():
            overflows = ~torch.stack([below(part, torch.inf) for part in projected]).all(0)[..., None]  # [B, T, 1]
        # Before the norms: their gradient at an infinite vector is nan, and masking what they give comes too late.
        projected = [torch.where(overflows, 0, part) for part in projected]
    q, k, v = (part.to(roles.compute) for part in projected)
    if mix is not None:
        q, k = mix(q, k, None if overflows is None else ~overflows[..., 0])
    q, k, v = (part.unflatten(-1, (options.num_heads, -1)) for part in (q, k, v))  # [B, T, D] -> [B, T, H, Dh]
    q, k = (
        rotate(
            l2_normalise(part, exact),
            position,
            theta=options.rope_theta,
            dtype=torch.promote_types(roles.rope, part.dtype),
        )
        for part in (q, k)
    )
    if weights.norm_weight is not None and weights.norm_bias is not None:
        norm_weight, norm_bias = weights.norm_weight.to(roles.compute), weights.norm_bias.to(roles.compute)
        v = reconstruction_target(v, k, norm_weight, norm_bias, options.target_eps, exact)
    if overflows is not None:
        v = torch.where(overflows[..., None], torch.nan, v)
    rate = F.linear(x.to(roles.compute), weights.lr_weight.flatten(0, 1).to(roles.compute))
    rate = torch.sigmoid(rate + weights.lr_bias.flatten().to(roles.compute))
    lr = options.base_lr / q.shape[-1] * rate
    return Tokens(*(part.to(roles.state) for part in (q, k, v, lr)))


def objective(weights: HybridWeights, options: HybridOptions, roles: DtypeRoles, exact: bool = False) -> Objective:
    """The inner loss, in the state's dtype, with the inner LayerNorm where there is one; ``exact`` is for that."""
    if weights.norm_weight is None or weights.norm_bias is None:
        return PlainLoss()
    weight, bias = weights.norm_weight.to(roles.state), weights.norm_bias.to(roles.state)
    return InnerNorm(weight, bias, options.norm_eps, exact)


def gated_output(
    x: Tensor,
    y: Tensor,
    weights: HybridWeights,
    options: HybridOptions,
    roles: DtypeRoles,
    volume: float | Tensor = 1.0,
) -> Tensor:
    """``x + volume * tanh(gate) * wo(post_norm(y))`` for ``x`` and ``y [B, T, D]``, in the dtype of ``x``.

    ``volume``: a number, or ``[B]``.
    """
    scale, shift = weights.post_norm.weight.to(roles.compute), weights.post_norm.bias.to(roles.compute)
    y = F.layer_norm(y.to(roles.compute), y.shape[-1:], scale, shift, options.post_norm_eps)
    update = weights.wo(y, roles.matmul).to(roles.output)
    return at_volume(x, torch.tanh(weights.gate.to(roles.output)) * update, volume, roles.output)
