"""Losses of Moshi's language model in nats per token.

Its logits hold NaN where the delays leave no prediction, so everything here picks by mask and never multiplies by it.
Shape legend: B streams, Q rows (text, then audio), K codebooks Moshi speaks, T frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def training_loss(model: Any, codes: Tensor, *, text_weight: float) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and its audio part, of ``codes [B, Q, T]``: means over the predicted tokens."""
    out = model(codes)
    audio = F.cross_entropy(out.logits[out.mask].float(), _audio(model, codes)[out.mask])
    if not text_weight:
        return audio, audio.detach()
    text = F.cross_entropy(out.text_logits[out.text_mask].float(), codes[:, :1][out.text_mask])
    return audio + text_weight * text, audio.detach()


@torch.no_grad()
def loss_by_frame(model: Any, codes: Tensor) -> Tensor:
    """``[T]`` float64: the audio loss of each frame, a mean over streams and codebooks; NaN where none is predicted."""
    out = model(codes)
    total = torch.zeros(out.mask.shape, dtype=torch.float64)
    total[out.mask] = F.cross_entropy(
        out.logits[out.mask].float(), _audio(model, codes)[out.mask], reduction="none"
    ).double()  # fmt: skip
    count: Tensor = out.mask.sum(dim=(0, 1))
    return total.sum(dim=(0, 1)) / count


def _audio(model: Any, codes: Tensor) -> Tensor:
    return codes[:, model.audio_offset : model.audio_offset + model.dep_q]
