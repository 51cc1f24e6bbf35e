"""The inner loss token by token: at the initial fast weights, and before and after each update.

Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620, figure 5. What the fast weights predict and what
they should have predicted is the variant's; everything else is here, once.

Shape legend: B streams, H heads, T tokens, C tokens a chunk, D width of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common import fast_network, inner_loop
from moshi_ttt.plugins.common.fast_network import UpdateRule
from moshi_ttt.plugins.common.inner_loop import Tokens
from moshi_ttt.plugins.common.objective import Objective


def curves(target: Tensor, predictions: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Half squared errors ``[B, H, T]`` of each prediction, and of the mean target as ``baseline``.

    Args:
        target: ``[B, H, T, D]``.
        predictions: by name, chunks ``[B, H, C, D]`` from the first token on. Tokens after the last are NaN.
    """
    length, losses = target.shape[2], {}
    for name, chunks in predictions.items():
        predicted = torch.cat(list(chunks), dim=2) if chunks else target[:, :, :0]
        loss = _half_square(predicted - target[:, :, : predicted.shape[2]])
        losses[name] = F.pad(loss, (0, length - loss.shape[2]), value=torch.nan)
    return losses | {"baseline": _half_square(target - target.mean(2, keepdim=True))}


def hybrid(
    tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor, rule: UpdateRule
) -> dict[str, Tensor]:
    """1/2 || LN(f(k; W)) - (v - k) ||^2 per token and head, without the token's learning rate.

    Without the inner LayerNorm, 1/2 || f(k; W) - v ||^2.

    NaN for a token that is not finite; the update of its chunk is skipped.

    Args:
        tokens: the T tokens of a sequence from its beginning.
        state: the initial one.
        token_scale: ``[C]``; a chunk's update has its last.
    """
    start, _ = inner_loop.unpack(state)
    fast, size = start, token_scale.shape[0]
    tokens, finite = inner_loop.only_finite(tokens)
    keys, values, rates = (part.transpose(1, 2) for part in (tokens.k, tokens.v, tokens.lr[..., None]))
    found: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
    chunks = zip(keys.split(size, 2), values.split(size, 2), rates.split(size, 2), finite.split(size, 1), strict=True)
    for k, v, lr, kept in chunks:
        found["initial"].append(norm(fast_network.forward(k, start)))
        found["before"].append(norm(fast_network.forward(k, fast)))
        if k.shape[2] == size:
            memory, tame = fast_network.teach(k, v, lr, fast, norm, token_scale)
            memory.tokens = (v, lr)
            rows = kept.all(1) if tame is None else (kept & tame).all(1)
            fast = fast_network.after_chunk(fast, memory, norm, token_scale[-1], rows, rule)
            found["after"].append(norm(fast_network.forward(k, fast)))
    losses = curves(norm.target(values, keys), found)
    return {name: loss.masked_fill(~finite[:, None], torch.nan) for name, loss in losses.items()}


def _half_square(error: Tensor) -> Tensor:
    return error.square().sum(-1) / 2
