"""The inner loop and the hybrid layer straight from their definitions: slow, per token, gradients by autograd.

Nothing here shares code with the fast path except the shapes. Read this to know what the fast path must compute.

Shape legend: B streams, H heads, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``z [B, H, 1, D]`` normalised over D (biased variance), scaled by ``weight`` and ``bias [H, D]``."""
    mean = z.mean(-1, keepdim=True)
    variance = ((z - mean) ** 2).mean(-1, keepdim=True)
    return (z - mean) / torch.sqrt(variance + eps) * weight[:, None] + bias[:, None]


def gelu(x: Tensor) -> Tensor:
    """The tanh form of gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def network(x: Tensor, fast: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """f(x; W) for ``x [B, H, 1, D]``: linear layers with gelu in between."""
    for index, (weight, bias) in enumerate(fast):
        x = (gelu(x) if index else x) @ weight + bias
    return x


def inner_loop(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, token_scale: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    weights: Sequence[Tensor], biases: Sequence[Tensor], *, chunk_size: int, eps: float, causal: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Definition of the inner loop.

    Args:
        q, k, v: ``[B, H, T, D]``.
        lr: ``[B, H, T]``.
        token_scale: ``[chunk_size]``.
        norm_weight, norm_bias: ``[H, D]``.
        weights, biases: per layer, ``[H, in, out]`` and ``[H, 1, out]``.

    Returns:
        ``y [B, H, T, D]``, and the weights and biases ``[B, H, ...]`` after the last full chunk.
    """
    batch, length = q.shape[0], q.shape[2]
    with torch.enable_grad():
        fast = [
            (_tracked(weight.expand(batch, *weight.shape)), _tracked(bias.expand(batch, *bias.shape)))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        outputs: list[Tensor] = []
        for start in range(0, length, chunk_size):
            tokens = range(start, min(start + chunk_size, length))
            gradients = [_loss_gradients(k, v, lr, t, fast, norm_weight, norm_bias, eps) for t in tokens]
            for n in range(len(tokens)):
                used = gradients[: n + 1] if causal else gradients
                local = _descend(fast, used, token_scale[n])
                query = q[:, :, tokens[n], None]
                outputs.append(query + layer_norm(network(query, local), norm_weight, norm_bias, eps))
            if len(tokens) == chunk_size:
                fast = _descend(fast, gradients, token_scale[-1])
    return torch.cat(outputs, dim=2), [weight for weight, _ in fast], [bias for _, bias in fast]


def _tracked(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().clone().requires_grad_()


def _loss_gradients(
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    t: int,
    fast: Sequence[tuple[Tensor, Tensor]],
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> list[Tensor]:
    """Gradient of token t's loss with respect to every weight and bias, flat: w0, b0, w1, b1, ..."""
    key, value = k[:, :, t, None], v[:, :, t, None]
    error = layer_norm(network(key, fast), weight, bias, eps) - (value - key)
    loss = (lr[:, :, t] * 0.5 * (error**2).sum((-1, -2))).sum()  # rows and heads do not share weights: summing is exact
    return list(torch.autograd.grad(loss, [p for layer in fast for p in layer], create_graph=True))


def _descend(
    fast: Sequence[tuple[Tensor, Tensor]], gradients: Sequence[Sequence[Tensor]], scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    total = [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]
    return [(weight - scale * total[2 * i], bias - scale * total[2 * i + 1]) for i, (weight, bias) in enumerate(fast)]


def rotated(x: Tensor, chunk_size: int, theta: float) -> Tensor:
    """RoPE on ``x [B, H, T, D]`` pair by pair, by the position in the chunk."""
    columns = []
    position = torch.arange(x.shape[2]) % chunk_size
    for pair in range(x.shape[-1] // 2):
        angle = position.to(x.dtype) * theta ** (-2 * pair / x.shape[-1])
        first, second = x[..., 2 * pair], x[..., 2 * pair + 1]
        columns += [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.stack(columns, dim=-1)


def hybrid_inputs(x: Tensor, given: dict[str, Tensor], *, num_heads: int, chunk_size: int, base_lr: float,
                  theta: float, target_eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v' ``[B, H, T, D]`` and lr ``[B, H, T]`` of the hybrid layer; ``given`` as in the reference vectors."""
    batch, length, dim = x.shape
    head_dim = dim // num_heads

    def heads(name: str) -> Tensor:
        projected = x @ given[f"{name}.weight"].T + given[f"{name}.bias"]
        return projected.view(batch, length, num_heads, head_dim).transpose(1, 2)

    q, k, v = heads("wq"), heads("wk"), heads("wv")
    q, k = (rotated(part / part.norm(dim=-1, keepdim=True), chunk_size, theta) for part in (q, k))
    difference = v - k
    mean = difference.mean(-1, keepdim=True)
    deviation = torch.sqrt(((difference - mean) ** 2).sum(-1, keepdim=True) / (head_dim - 1))
    target = (
        given["norm_weight"][:, None] * (difference - mean) / (deviation + target_eps) + given["norm_bias"][:, None]
    )
    rate = torch.einsum("btd,hd->bht", x, given["lr_weight"][:, 0]) + given["lr_bias"]
    return q, k, target + k, base_lr * torch.sigmoid(rate) / head_dim


def hybrid_output(x: Tensor, y: Tensor, given: dict[str, Tensor], *, eps: float) -> Tensor:
    """``x + tanh(alpha) * wo(post_norm(y))`` for ``x [B, T, H*D]`` and the inner loop's ``y [B, H, T, D]``."""
    merged = y.transpose(1, 2).reshape(x.shape)
    centred = merged - merged.mean(-1, keepdim=True)
    normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    normal = normal * given["post_norm.weight"] + given["post_norm.bias"]
    return x + torch.tanh(given["alpha"]) * (normal @ given["wo.weight"].T + given["wo.bias"])
