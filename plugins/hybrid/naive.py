"""The naive form: the inner loop and the hybrid layer from their definitions. Slow, per token, gradients by autograd.

Nothing here shares code with the fast forms. Read this to know what they must compute.

Shape legend: B streams, H heads, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``z [B, H, 1, D]`` normalized over D (biased variance), scaled by ``weight`` and ``bias [H, D]``."""
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


def naive_inner_loop(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, token_scale: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    weights: Sequence[Tensor], biases: Sequence[Tensor], *, chunk_size: int, eps: float, causal: bool,
    steps: int = 1, momentum: Tensor | None = None, norm: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Definition of the inner loop.

    With momentum eta, S <- eta S - scale * sum of gradients and W <- W + S; query n reads W + eta S - scale[n] * sum
    over the keys up to its own. A chunk whose tokens all have a gradient of zero has no such step. Steps of a finished
    chunk after its first have the gradients of all its tokens at the weights before them.

    Args:
        q, k, v: ``[B, H, T, D]``.
        lr: ``[B, H, T]``.
        token_scale: ``[chunk_size]``.
        norm_weight, norm_bias: ``[H, D]``.
        weights, biases: per layer, ``[H, in, out]`` and ``[H, 1, out]``.
        steps: gradient steps on a finished chunk.
        momentum: eta, ``[H, 1, 1]``; None: none.
        norm: False: the loss is ``lr / 2 |f(k) - v|^2``, and y is ``f(q)``.

    Returns:
        ``y [B, H, T, D]``, and the weights and biases ``[B, H, ...]`` after the last full chunk.
    """
    batch, length = q.shape[0], q.shape[2]
    with torch.enable_grad():
        fast = [
            # [H, in, out] -> [B, H, in, out], and [H, 1, out] -> [B, H, 1, out]
            (_tracked(weight.expand(batch, *weight.shape)), _tracked(bias.expand(batch, *bias.shape)))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        learned = (norm_weight, norm_bias, eps) if norm else None
        velocity = [torch.zeros_like(tensor) for layer in fast for tensor in layer]
        outputs: list[Tensor] = []
        for start in range(0, length, chunk_size):
            tokens = range(start, min(start + chunk_size, length))
            gradients = [_loss_gradients(k, v, lr, t, fast, learned) for t in tokens]
            for n in range(len(tokens)):
                used = gradients[: n + 1] if causal else gradients
                local, _ = _descend(fast, velocity, used, token_scale[n], momentum)
                query = q[:, :, tokens[n], None]  # [B, H, D] -> [B, H, 1, D]
                z = network(query, local)
                outputs.append(z if learned is None else query + layer_norm(z, *learned))
            for step in range(steps if len(tokens) == chunk_size else 0):
                if step:
                    gradients = [_loss_gradients(k, v, lr, t, fast, learned) for t in tokens]
                fast, velocity = _descend(fast, velocity, gradients, token_scale[-1], momentum)
    # T times [B, H, 1, D] -> [B, H, T, D]
    return torch.cat(outputs, dim=2), [weight for weight, _ in fast], [bias for _, bias in fast]


def _tracked(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().clone().requires_grad_()


def _loss_gradients(
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    t: int,
    fast: Sequence[tuple[Tensor, Tensor]],
    norm: tuple[Tensor, Tensor, float] | None,
) -> list[Tensor]:
    """Gradient of token t's loss with respect to every weight and bias, flat: w0, b0, w1, b1, ..."""
    key, value = k[:, :, t, None], v[:, :, t, None]
    z = network(key, fast)
    error = z - value if norm is None else layer_norm(z, *norm) - (value - key)
    loss = (lr[:, :, t] * 0.5 * (error**2).sum((-1, -2))).sum()  # rows and heads do not share weights: summing is exact
    return list(torch.autograd.grad(loss, [p for layer in fast for p in layer], create_graph=True))


def _descend(
    fast: Sequence[tuple[Tensor, Tensor]],
    velocity: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    scale: Tensor,
    momentum: Tensor | None,
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """The weights after a step, and the velocity, flat: of w0, b0, w1, b1, ..."""
    total = [torch.stack(parts).sum(0) for parts in zip(*gradients, strict=True)]
    moved = [-scale * part for part in total]
    if momentum is not None:
        rows = torch.stack([(part.detach() != 0).flatten(1).any(1) for step in gradients for part in step]).any(0)
        rows = rows[:, None, None, None]  # [B, 1, 1, 1]: those with a gradient
        moved = [torch.where(rows, momentum * s + part, 0) for s, part in zip(velocity, moved, strict=True)]
        velocity = [torch.where(rows, s, old) for s, old in zip(moved, velocity, strict=True)]
    pairs = [(weight + moved[2 * i], bias + moved[2 * i + 1]) for i, (weight, bias) in enumerate(fast)]
    return pairs, list(velocity)


def convolved(z: Tensor, taps: Tensor) -> Tensor:
    """``z [B, T, D]`` to ``sum_j taps[:, j] z_(t-j)``, with ``taps [D, K]``; zero before the first token."""
    columns = []
    for t in range(z.shape[1]):
        columns.append(sum((taps[:, j] * z[:, t - j] for j in range(min(taps.shape[1], t + 1))), torch.zeros(())))
    return torch.stack(columns, dim=1)


def rotated(x: Tensor, chunk_size: int, theta: float) -> Tensor:
    """RoPE on ``x [B, H, T, D]`` pair by pair, by the position in the chunk."""
    columns = []
    position = torch.arange(x.shape[2]) % chunk_size
    for pair in range(x.shape[-1] // 2):
        angle = position.to(x.dtype) * theta ** (-2 * pair / x.shape[-1])
        first, second = x[..., 2 * pair], x[..., 2 * pair + 1]
        columns += [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.stack(columns, dim=-1)


def naive_inputs(x: Tensor, given: dict[str, Tensor], *, num_heads: int, chunk_size: int, base_lr: float,
                  theta: float, target_eps: float, embeddings: Tensor | None = None,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v' ``[B, H, T, D]`` and lr ``[B, H, T]`` of the hybrid layer; ``given`` as in the reference vectors.

    With ``query_taps`` and ``key_taps`` among them queries and keys are convolved over time; without ``norm_weight``
    v' is v; with ``embeddings [B, T, D]`` values come from those.
    """
    batch, length, dim = x.shape
    head_dim = dim // num_heads

    def heads(name: str, source: Tensor, taps: str) -> Tensor:
        projected = source @ given[f"{name}.weight"].T + given[f"{name}.bias"]
        if taps in given:
            projected = convolved(projected, given[taps])
        # [B, T, H D] -> [B, T, H, D] -> [B, H, T, D]
        return projected.view(batch, length, num_heads, head_dim).transpose(1, 2)

    source = x if embeddings is None else embeddings / (embeddings**2).mean(-1, keepdim=True).sqrt()
    q, k, v = heads("wq", x, "query_taps"), heads("wk", x, "key_taps"), heads("wv", source, "")
    q, k = (rotated(part / part.norm(dim=-1, keepdim=True), chunk_size, theta) for part in (q, k))
    # [B, T, H D] and [H, 1, H D] -> [B, H, T], plus [H, 1]
    rate = torch.einsum("btd,hd->bht", x, given["lr_weight"][:, 0]) + given["lr_bias"]
    rate = base_lr * torch.sigmoid(rate) / head_dim
    if "norm_weight" not in given:
        return q, k, v, rate
    difference = v - k
    mean = difference.mean(-1, keepdim=True)
    deviation = torch.sqrt(((difference - mean) ** 2).sum(-1, keepdim=True) / (head_dim - 1))
    # [H, 1, D] over [B, H, T, D]
    target = (
        given["norm_weight"][:, None] * (difference - mean) / (deviation + target_eps) + given["norm_bias"][:, None]
    )
    return q, k, target + k, rate


def naive_output(x: Tensor, y: Tensor, given: dict[str, Tensor], *, eps: float) -> Tensor:
    """``x + tanh(alpha) * wo(post_norm(y))`` for ``x [B, T, H*D]`` and the inner loop's ``y [B, H, T, D]``."""
    merged = y.transpose(1, 2).reshape(x.shape)
    centered = merged - merged.mean(-1, keepdim=True)
    normal = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + eps)
    normal = normal * given["post_norm.weight"] + given["post_norm.bias"]
    return x + torch.tanh(given["alpha"]) * (normal @ given["wo.weight"].T + given["wo.bias"])
