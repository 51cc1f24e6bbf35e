"""The naive form of ``ttt_ridge``, from its definition: sums over all tokens, one solution for each chunk.

Slow and plain, for tests and reference vectors. Nothing here is shared with the fast forms.

Shape legend: B streams, T tokens, D width, H heads, m key width, d value width, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def naive_ridge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor,
    regularization: Tensor,
    *,
    chunk_size: int,
    keep: float = 1.0,
    novelty: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each token reads, the variance of its query, and the solution after the last whole chunk.

    Args:
        q, k: ``[B, T, H, m]``; ``v [B, T, H, d]``; ``strength [B, T, H]``; ``regularization [H]``.
        keep: gamma, by which a token divides what was known before it.
        novelty: offset and slope ``[H]``.

    Returns:
        ``[B, T, H, d]``, ``[B, T, H]`` and ``[B, H, m, d]``.
    """
    batch, length, heads, width = q.shape
    prior = regularization[:, None, None] * torch.eye(width, dtype=q.dtype)  # [H, m, m]
    information = prior.expand(batch, heads, width, width)  # [H, m, m] -> [B, H, m, m]
    products = torch.zeros(batch, heads, width, v.shape[-1], dtype=q.dtype)
    solution, posterior = torch.linalg.solve(information, products), torch.linalg.inv(information) @ prior
    reads, variances = [], []
    for t in range(length):
        if t % chunk_size == 0:
            solution, posterior = torch.linalg.solve(information, products), torch.linalg.inv(information) @ prior
        reads.append(torch.einsum("bhmd,bhm->bhd", solution, q[:, t]))
        variances.append(torch.einsum("bhm,bhmn,bhn->bh", q[:, t], posterior, q[:, t]))
        weight = strength[:, t]
        if novelty is not None:
            predicted = torch.einsum("bhmd,bhm->bhd", solution, k[:, t])
            weight = weight * torch.sigmoid(novelty[0] - novelty[1] * cosine(predicted, v[:, t]))
        information, products = keep * information, keep * products
        one = torch.zeros(width, dtype=q.dtype)
        one[t % width] = 1
        information = information + (1 - keep) * width * prior * torch.outer(one, one)
        information = information + torch.einsum("bh,bhm,bhn->bhmn", weight, k[:, t], k[:, t])
        products = products + torch.einsum("bh,bhm,bhd->bhmd", weight, k[:, t], v[:, t])
    if length % chunk_size == 0:
        solution = torch.linalg.solve(information, products)
    return torch.stack(reads, 1), torch.stack(variances, 1), solution  # T times [B, H, ...] -> [B, T, H, ...]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """``[B, H]``, of ``a`` and ``b [B, H, d]``; zero where either is."""
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(size > 0, (a * b).sum(-1) / torch.where(size > 0, size, 1), 0)


def success_gate(read: Tensor, value: Tensor, bias: Tensor, slope: Tensor, taps: Tensor) -> Tensor:
    """``[B, T, H]`` from ``read`` and ``value [B, T, H, d]``, ``bias`` and ``slope [H]`` and ``taps [H, J]``."""
    scores: list[Tensor] = []
    gates = []
    for t in range(read.shape[1]):
        predicted = read[:, t - 1] if t else torch.zeros_like(read[:, 0])
        scores.append(cosine(predicted, value[:, t]))
        mean = sum(taps[:, j] * scores[t - j] for j in range(taps.shape[1]) if t >= j)
        gates.append(torch.sigmoid(bias + slope * mean))
    return torch.stack(gates, 1)


def naive_layer(
    x: Tensor,
    source: Tensor,
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    chunk_size: int,
    features: str = "identity",
    keep: float = 1.0,
    readout_scale: float = 8.0,
) -> Tensor:
    """The whole block, ``y [B, T, D]``.

    Args:
        x: ``[B, T, D]``.
        source: what values are made of, like ``x``.
        weights: the block's parameters by their names; gates whose parameters are not there are left out.
    """

    def normal(a: Tensor) -> Tensor:
        return a / torch.sqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)

    def convolved(z: Tensor, taps: Tensor) -> Tensor:
        out = torch.zeros_like(z)
        for t in range(z.shape[1]):
            for j in range(min(t + 1, taps.shape[1])):
                out[:, t] = out[:, t] + taps[:, j] * z[:, t - j]
        if features == "relu2":
            out = out.clamp(min=0) ** 2
        out = out.unflatten(-1, (heads, -1))  # [B, T, H m] -> [B, T, H, m]
        norm = out.norm(dim=-1, keepdim=True)
        unit: Tensor = out / torch.where(norm > 0, norm, 1)  # [B, T, H, m] over [B, T, H, 1]
        return unit

    z = normal(x) @ weights["wqk.weight"].T + weights["wqk.bias"]
    q, k = convolved(z, weights["conv_q"]), convolved(z, weights["conv_k"])
    v = (normal(source) @ weights["value_weight"].T).unflatten(-1, (heads, -1))  # [B, T, H d] -> [B, T, H, d]
    strength = torch.sigmoid(normal(x) @ weights["write.weight"].T + weights["write.bias"])
    novelty = None
    if "novelty_offset" in weights:
        novelty = (weights["novelty_offset"], weights["novelty_slope"])
    regularization = weights["log_regularization"].exp()
    read, variance, _ = naive_ridge(
        q, k, v, strength, regularization, chunk_size=chunk_size, keep=keep, novelty=novelty
    )
    gate = torch.ones_like(read[..., 0])
    if "success.bias" in weights:
        parts = (weights[f"success.{name}"] for name in ("bias", "slope", "weights"))
        gate = gate * success_gate(read, v, *parts)
    if "variance_offset" in weights:
        log_variance = torch.log(variance + 1e-4)
        gate = gate * torch.sigmoid(weights["variance_offset"] - weights["variance_slope"] * log_variance)
    # [B, T, H, d] -> [B, T, H d]
    added = (readout_scale * gate[..., None] * read).flatten(2) @ weights["wo.weight"].T + weights["wo.bias"]
    y: Tensor = x + torch.tanh(weights["gate"]) * added
    return y
