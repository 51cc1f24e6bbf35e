"""The inner loss token by token, from what a block predicts and what it should predict.

Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620, figure 5.

Shape legend: B streams, H heads, T tokens, C tokens a chunk, D width of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def curves(target: Tensor, predictions: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Half squared errors ``[B, H, T]`` of each prediction, and of the mean target as ``baseline``.

    Args:
        target: ``[B, H, T, D]``.
        predictions: by name, chunks ``[B, H, C, D]`` from the first token on. Tokens after the last are NaN.
    """
    length, losses = target.shape[2], {}
    for name, chunks in predictions.items():
        predicted = torch.cat(list(chunks), dim=2) if chunks else target[:, :, :0]  # [B, H, up to T, D]
        loss = _half_square(predicted - target[:, :, : predicted.shape[2]])
        losses[name] = F.pad(loss, (0, length - loss.shape[2]), value=torch.nan)  # [B, H, T]
    return losses | {"baseline": _half_square(target - target.mean(2, keepdim=True))}


def _half_square(error: Tensor) -> Tensor:
    """``[B, H, T]`` of ``error [B, H, T, D]``."""
    return error.square().sum(-1) / 2
