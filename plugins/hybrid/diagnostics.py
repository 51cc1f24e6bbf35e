"""Diagnostics of a TTT layer: figures of keys and targets, the inner loss, and which of them are red flags.

Thresholds: a key has norm 1 after normalization; a target's normalized part has the variance that the unbiased standard
deviation gives it, whatever the data; targets more than 100 times as large as keys explode; a standard deviation below
1e-5 in more than a tenth of the tokens means the target is noise.

Shape legend: B streams, T tokens, H heads, Dh head width, C tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.inner_curves import curves
from moshi_ttt.plugins.hybrid import fast_network, inner_loop
from moshi_ttt.plugins.hybrid.chunk_gradient import WholeChunks
from moshi_ttt.plugins.hybrid.fast_network import FastNetwork, UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective

SMALL_STD = 1e-5
CLEAR_STD = 1e-2
"""Above this, the eps in the target's denominator makes no difference."""
RAISED = 1.1
"""An update that raises the inner loss by more than a tenth has too high a learning rate; less may be noise."""


def target_figures(tokens: Tokens, finite: Tensor, value: Tensor, norm: Objective) -> dict[str, Tensor]:
    """Figures of the keys and targets of finite tokens; those of the normalized target only where it is normalized.

    Args:
        tokens, finite: what ``inner_loop.only_finite`` gives; ``v`` is the normalized target plus k.
        value: ``[B, T, H, Dh]``, the value before normalization.
    """
    figures = {"key_norm": tokens.k.norm(dim=-1).max()}
    return figures | _normalized(tokens, finite, value, norm) if isinstance(norm, InnerNorm) else figures


def _normalized(tokens: Tokens, finite: Tensor, value: Tensor, norm: InnerNorm) -> dict[str, Tensor]:
    kept = finite[..., None]  # [B, T] -> [B, T, 1], for [B, T, H]
    std = (value - tokens.k).std(-1)  # [B, T, H]
    weight = torch.where(norm.weight == 0, 1, norm.weight)
    normal = (tokens.v - tokens.k - norm.bias) / weight
    expected = normal.shape[-1] - 1
    deviation = (normal.square().sum(-1) / expected - 1).abs()
    return {
        "std_smallest": torch.where(kept, std, torch.inf).min(),
        "std_largest": torch.where(kept, std, 0).max(),
        "std_below_eps": (kept & (std < SMALL_STD)).float().mean() / finite.float().mean(),
        "target_variance_error": torch.where(kept & (std > CLEAR_STD), deviation, 0).max(),
        "amplification": tokens.v.abs().max() / tokens.k.abs().max(),
    }


def inner_losses(
    tokens: Tokens, finite: Tensor, state: BlockState, norm: Objective, token_scale: Tensor, rule: UpdateRule,
    whole: WholeChunks | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean reconstruction loss of the whole chunks, at the chunk's first weights and after the chunk's update.

    Unweighted: 1/2 || LN(f(k)) - (v - k) ||^2 per finite token and head, without the inner LayerNorm
    1/2 || f(k) - v ||^2. nan where no whole chunk has a finite token. ``tokens`` and ``finite [B, T]`` are what
    ``inner_loop.only_finite`` gives. ``whole``: what computes the block's whole chunks, if not tensor operations.
    """
    fast, _ = inner_loop.unpack(state)
    chunk_size = token_scale.shape[0]
    layout = ChunkLayout(tokens.q.shape[1], chunk_size, device=tokens.q.device)
    heads = tokens.q.shape[2]
    applied = layout.split((~finite)[..., None]).sum((2, 3)) == 0  # [B, T, 1] -> [B, N, C, 1] -> [B, N]
    if whole is not None and isinstance(norm, InnerNorm) and tokens.q.shape[1] >= chunk_size:
        return _at_once(tokens, finite, applied, fast, norm, token_scale, whole)
    # [B, T, H any] -> [B, H, N, C, any] -> N times [B, H, C, any]
    _, keys, values, rates = (layout.split(part.flatten(2), heads).unbind(2) for part in tokens)
    chunks = tokens.q.shape[1] // chunk_size
    kept = finite[:, : chunks * chunk_size]  # [B, whole chunks' tokens]
    before = after = tokens.q.new_zeros(())
    for n, now in enumerate(kept.split(chunk_size, 1) if chunks else ()):  # now [B, C]
        memory, bounded = fast_network.chunk_gradients(keys[n], values[n], rates[n], fast, norm, token_scale)
        memory.tokens = (values[n], rates[n])
        before = before + _loss(keys[n], values[n], now, fast, norm)
        rows = applied[:, n] if bounded is None else applied[:, n] & bounded.all(1)  # [B]
        fast = fast_network.after_chunk(fast, memory, norm, token_scale[-1], rows, rule)
        after = after + _loss(keys[n], values[n], now, fast, norm)
    first, second = before / (kept.sum() * heads), after / (kept.sum() * heads)
    return {"inner_loss_before": first, "inner_loss_after": second, "inner_loss_ratio": second / first}


def _at_once(
    tokens: Tokens, finite: Tensor, applied: Tensor, fast: FastNetwork, norm: InnerNorm, token_scale: Tensor,
    whole: WholeChunks,
) -> dict[str, Tensor]:  # fmt: skip
    """``inner_losses`` by ``whole``: a key's loss is that of a query there that sees none, or all, of its chunk's keys.

    ``applied [B, N]``: chunks without a token that is not finite.
    """
    size, heads, length = token_scale.shape[0], tokens.q.shape[2], tokens.q.shape[1]
    chunks = length // size
    k, v, lr = (part[:, : chunks * size].float().contiguous() for part in (tokens.k, tokens.v, tokens.lr))
    fast = FastNetwork(*(tuple(each.float().contiguous() for each in part) for part in (fast.weights, fast.biases)))
    norm = InnerNorm(norm.weight.float(), norm.bias.float(), norm.eps)
    last = token_scale[-1:].float()
    scale = torch.where(applied[:, :chunks], last, 0)  # [B, N]
    found = []
    for seen in (torch.zeros_like(last), last):  # every query's scale, [1] -> [C]
        y, _ = whole(Tokens(k, k, v, lr), fast, norm, seen.repeat(size), scale, causal=False, together=None)
        found.append((y - v).square().sum(-1) / 2)  # y - k - (v - k), [B, T, H, D] -> [B, T, H]
    updated = applied[:, :chunks].repeat_interleave(size, 1, output_size=chunks * size)  # [B, N] -> [B, T]
    before, after = found[0], torch.where(updated[..., None], found[1], found[0])
    kept = finite[:, : chunks * size, None]  # [B, T, 1] over [B, T, H]
    count = kept.sum() * heads
    first, second = (torch.where(kept, each, 0).sum() / count for each in (before, after))
    return {"inner_loss_before": first, "inner_loss_after": second, "inner_loss_ratio": second / first}


def _loss(keys: Tensor, values: Tensor, kept: Tensor, fast: FastNetwork, norm: Objective) -> Tensor:
    """The loss summed over heads and over tokens where ``kept [B, C]``; ``keys`` and ``values [B, H, C, Dh]``."""
    losses = (norm(fast_network.forward(keys, fast)) - norm.target(values, keys)).square().sum(-1) / 2  # [B, H, C]
    return torch.where(kept[:, None], losses, 0).sum()  # [B, 1, C] over [B, H, C]


def inner_loss_curves(
    tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor, rule: UpdateRule
) -> dict[str, Tensor]:
    """1/2 || LN(f(k; W)) - (v - k) ||^2 per token and head ``[B, H, T]``, without the token's learning rate.

    At the initial fast weights, and before and after each update. Without the inner LayerNorm 1/2 || f(k; W) - v ||^2.
    NaN for a token that is not finite; the update of its chunk is skipped.

    Args:
        tokens: the T tokens of a sequence from its beginning.
        state: the initial one.
        norm: the inner loss.
        token_scale: ``[C]``; a chunk's update has its last.
        rule: how a finished chunk updates the fast weights.
    """
    start, _ = inner_loop.unpack(state)
    fast, size = start, token_scale.shape[0]
    tokens, finite = inner_loop.only_finite(tokens)
    # k, v [B, T, H, Dh] -> [B, H, T, Dh], and lr [B, T, H] -> [B, T, H, 1] -> [B, H, T, 1]
    keys, values, rates = (part.transpose(1, 2) for part in (tokens.k, tokens.v, tokens.lr[..., None]))
    found: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
    chunks = zip(keys.split(size, 2), values.split(size, 2), rates.split(size, 2), finite.split(size, 1), strict=True)
    for k, v, lr, kept in chunks:
        found["initial"].append(norm(fast_network.forward(k, start)))
        found["before"].append(norm(fast_network.forward(k, fast)))
        if k.shape[2] == size:
            memory, bounded = fast_network.chunk_gradients(k, v, lr, fast, norm, token_scale)
            memory.tokens = (v, lr)
            rows = kept.all(1) if bounded is None else (kept & bounded).all(1)  # [B]
            fast = fast_network.after_chunk(fast, memory, norm, token_scale[-1], rows, rule)
            found["after"].append(norm(fast_network.forward(k, fast)))
    losses = curves(norm.target(values, keys), found)
    return {name: loss.masked_fill(~finite[:, None], torch.nan) for name, loss in losses.items()}  # [B, 1, T]


def losses_at(tokens: Tokens, state: BlockState, norm: Objective) -> Tensor:
    """The loss of ``inner_loss_curves`` at the fast weights of ``state``, ``[B, H, T]``. NaN as there."""
    fast, _ = inner_loop.unpack(state)
    tokens, finite = inner_loop.only_finite(tokens)
    keys, values = (part.transpose(1, 2) for part in (tokens.k, tokens.v))  # [B, T, H, Dh] -> [B, H, T, Dh]
    losses = curves(norm.target(values, keys), {"now": [norm(fast_network.forward(keys, fast))]})
    return losses["now"].masked_fill(~finite[:, None], torch.nan)  # [B, 1, T] over [B, H, T]


def red_flags(figures: Mapping[str, float]) -> list[str]:
    """A sentence for each figure beyond its threshold."""
    flags = []
    if figures["nonfinite_tokens"] > 0:
        flags.append(
            f"{figures['nonfinite_tokens']:.1%} of the tokens are not finite or too large, so the updates of their "
            "chunks are skipped: lower base_lr, or look at the input."
        )
    if figures["key_norm"] > 1.01:
        flags.append(f"A key has norm {figures['key_norm']:.3g}: keys must be L2-normalized.")
    if figures.get("std_smallest", 0) < 0 or figures.get("target_variance_error", 0) > 0.01:
        flags.append(
            f"The targets' variance is off by {figures['target_variance_error']:.1%}: they are not divided by the "
            "standard deviation of v - k."
        )
    if figures.get("std_below_eps", 0) > 0.1:
        flags.append(
            f"v - k is nearly constant in {figures['std_below_eps']:.0%} of the tokens: the target is noise. "
            "Look at the value projection."
        )
    if figures.get("amplification", 0) > 100:
        flags.append(f"Targets are {figures['amplification']:.3g} times as large as keys: the inner loop explodes.")
    if figures["token_scale_last"] == 0:
        flags.append("The token scale at the chunk's last position is 0: no update changes the state.")
    if figures["inner_loss_ratio"] > RAISED:
        flags.append(f"Updates make the inner loss {figures['inner_loss_ratio']:.3g} times as large: lower base_lr.")
    return flags
