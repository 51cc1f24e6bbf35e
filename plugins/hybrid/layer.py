"""The layer around the inner loop: projections, normalization, RoPE, target, post norm, gate.

The hybrid layer of Dalal et al. 2025 (arXiv:2504.05298), forward direction, on the un-normalized residual stream:

    q, k, v = projections of x, per head; q and k L2-normalized and rotated (position within the chunk)
    v'      = gamma * (v - k - mean) / (std + eps) + beta + k       (gamma, beta: the inner LayerNorm's)
    lr_t    = base_lr * sigmoid(w_h . x_t + b_h) / Dh
    y       = x + tanh(alpha) * (W_o LN(inner loop(q, k, v')) + b_o)

Three options change this: a short causal convolution over time on the projected queries and keys, before they are
normalized (``conv_kernel``); v projected from e / rms(e), e the host's input embedding of the token (``value``); and no
inner LayerNorm, with v' = v (``inner_norm``).

The functions here are pure: weights and options come as a ``HybridLayer``. ``parameters.py`` has the module that owns
the parameters, ``naive.py`` the same layer from its definition.

Shape legend: B streams, T tokens, D width, H heads, Dh = D / H, C tokens a chunk, L layers of the fast network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.volume import at_volume
from moshi_ttt.plugins.common.finite import below
from moshi_ttt.plugins.common.normalization import l2_normalize
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective, PlainLoss
from moshi_ttt.plugins.hybrid.rope import rotate


@dataclass
class HybridLayer:
    """What the functions of this module need of a layer: its options, its dtypes and its tensors.

    Everything learned is here, but for the fast network's initial weights and the convolution's taps. Not frozen:
    torch.compile cannot trace a frozen dataclass that holds tensors. Nothing writes to it.

    Attributes:
        config: the options.
        roles: the dtype of each role.
        wq, wk, wv, wo: ``[D, D]`` projections with bias.
        lr_weight, lr_bias: ``[H, 1, D]`` and ``[H, 1]``.
        norm_weight, norm_bias: ``[H, Dh]``, shared by the target and the inner LayerNorm; None without that.
        post_norm: weight and bias ``[D]``.
        token_scale: ``[C]``, as used: max(0, 1/(n+1) + learned_n) in a causal layer. ttt-lm calls the learned part
            ``token_idx``.
        gate: ``[D]`` or ``[1]``, alpha, before tanh.
    """

    config: HybridConfig
    roles: DtypeRoles
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

    @property
    def num_heads(self) -> int:
        return self.lr_weight.shape[0]


Mix = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""``(q, k, finite) -> (q, k)``: projected queries and keys ``[B, T, D]`` mixed over time; ``finite [B, T]`` or None."""


def reconstruction_target(
    v: Tensor, k: Tensor, weight: Tensor, bias: Tensor, eps: float, exact: bool = False
) -> Tensor:
    """``weight * (v - k - mean) / (std + eps) + bias + k``, std unbiased (n - 1), over the last dimension.

    A constant ``v - k`` is not divided by eps: it has nothing to normalize, and its gradient would be 1 / eps.

    Args:
        v, k: ``[B, T, H, Dh]``.
        weight, bias: ``[H, Dh]``.
        exact: as in ``l2_normalize``.
    """
    difference = v - k
    centered = difference - difference.mean(-1, keepdim=True)
    std = difference.std(-1, keepdim=True)  # [B, T, H, 1]
    positive = std > 0
    if exact:
        varied = torch.arange(difference.shape[-1], device=difference.device, dtype=difference.dtype)  # [Dh]
        std = torch.where(positive, difference, varied).std(-1, keepdim=True)
    return weight * centered / torch.where(positive, std + max(eps, torch.finfo(std.dtype).tiny), 1) + bias + k


def inner_inputs(
    x: Tensor,
    position: Tensor,
    layer: HybridLayer,
    exact: bool = False,
    *,
    source: Tensor | None = None,
    mix: Mix | None = None,
) -> Tokens:
    """What enters the inner loop, token by token, in the state's dtype.

    Args:
        x: ``[B, T, D]``.
        position: ``[B or 1, T]``, each token's position in its chunk, or ``[1, T, A]``, its position on a grid.
        exact: as in ``l2_normalize``.
        source: ``[B, T, D]``, what values are projected from; None: ``x``.
        mix: applied to queries and keys between projection and normalization.

    Returns:
        q, k, v and lr. v is what the objective takes: v', or without an inner LayerNorm the value itself. It is nan
        where a projection overflows: the inner loop leaves such a token out.
    """
    roles = layer.roles
    projected, finite = _projected(x, x if source is None else source, layer)
    q, k, v = (part.to(roles.compute) for part in projected)
    if mix is not None:
        q, k = mix(q, k, finite)
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)) for part in (q, k, v))  # [B, T, D] -> [B, T, H, Dh]
    q, k = (
        rotate(
            l2_normalize(part, exact),
            position,
            theta=layer.config.rope_theta,
            dtype=torch.promote_types(roles.rope, part.dtype),
        )
        for part in (q, k)
    )
    if layer.norm_weight is not None and layer.norm_bias is not None:
        weight, bias = layer.norm_weight.to(roles.compute), layer.norm_bias.to(roles.compute)
        v = reconstruction_target(v, k, weight, bias, layer.config.target_eps, exact)
    if finite is not None:
        v = torch.where(finite[..., None, None], v, torch.nan)  # [B, T, 1, 1] over [B, T, H, Dh]
    # [H, 1, D] -> [H, D], and [H, 1] -> [H]
    rate = F.linear(x.to(roles.compute), layer.lr_weight.flatten(0, 1).to(roles.compute))  # [B, T, H]
    rate = torch.sigmoid(rate + layer.lr_bias.flatten().to(roles.compute))  # [H] over [B, T, H]
    lr = layer.config.base_lr / q.shape[-1] * rate
    return Tokens(*(part.to(roles.state) for part in (q, k, v, lr)))


def _projected(x: Tensor, source: Tensor, layer: HybridLayer) -> tuple[list[Tensor], Tensor | None]:
    """Projected queries, keys and values ``[B, T, D]``, and ``[B, T]`` bool, which tokens' are finite; None: all.

    Zero where they are not.
    """
    pairs = ((layer.wq, x), (layer.wk, x), (layer.wv, source))
    projected = [projection(part, layer.roles.matmul) for projection, part in pairs]
    if layer.roles.matmul != torch.float16:  # other dtypes hold a projection of every token that the block lets through
        return projected, None
    with torch.no_grad():
        finite = torch.stack([below(part, torch.inf) for part in projected]).all(0)  # [3, B, T] -> [B, T]
    # Before the norms: their gradient at an infinite vector is nan, and masking their output is too late.
    return [torch.where(finite[..., None], part, 0) for part in projected], finite


def objective(layer: HybridLayer, exact: bool = False) -> Objective:
    """The inner loss, in the state's dtype, with the inner LayerNorm where the layer has one.

    ``exact``: see ``InnerNorm``.
    """
    if layer.norm_weight is None or layer.norm_bias is None:
        return PlainLoss()
    weight, bias = layer.norm_weight.to(layer.roles.state), layer.norm_bias.to(layer.roles.state)
    return InnerNorm(weight, bias, layer.config.norm_eps, exact)


def gated_output(x: Tensor, y: Tensor, layer: HybridLayer, volume: float | Tensor = 1.0) -> Tensor:
    """``x + volume * tanh(gate) * wo(post_norm(y))``, in the dtype of ``x``.

    Args:
        x: ``[B, T, D]``, the residual stream.
        y: ``[B, T, D]``, the inner loop's output.
        volume: a number, or ``[B]``.
    """
    roles = layer.roles
    scale, shift = layer.post_norm.weight.to(roles.compute), layer.post_norm.bias.to(roles.compute)
    y = F.layer_norm(y.to(roles.compute), y.shape[-1:], scale, shift, layer.config.post_norm_eps)
    update = layer.wo(y, roles.matmul).to(roles.output)
    return at_volume(x, torch.tanh(layer.gate.to(roles.output)) * update, volume, roles.output)
