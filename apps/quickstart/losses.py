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


def delayed(model: Any, codes: Tensor) -> Tensor:
    """``[Q, T + 1]``: the start token, then each row of ``codes [Q, T]`` right by its delay, as Moshi reads it."""
    rows = []
    for row, delay in enumerate(model.delays):
        start = model.text_initial_token_id if row == 0 else model.initial_token_id
        rows.append(torch.cat([codes.new_full((1 + delay,), start), codes[row, : codes.shape[1] - delay]]))
    return torch.stack(rows)


@torch.no_grad()
def loss_of_outputs(model: Any, codes: Tensor, outputs: Tensor) -> Tensor:
    """``loss_by_frame`` of ``codes [Q, T]``, given what the main transformer made of them, ``outputs [1, T, D]``."""
    targets = delayed(model, codes)[None, :, 1:]
    logits = model.forward_depformer_training(targets, outputs)[0]
    losses = F.cross_entropy(
        logits.transpose(1, 2).float(), _audio(model, targets)[0], reduction="none", ignore_index=model.initial_token_id
    ).double()  # fmt: skip
    delays = model.delays[model.audio_offset : model.audio_offset + model.dep_q]
    total, count = torch.zeros(2, codes.shape[1], dtype=torch.float64)
    for row, delay in zip(losses, delays, strict=True):
        kept = len(row) - delay  # row is late by its delay, and its last codes are never predicted
        total[:kept] += row[delay:]
        count[:kept] += 1
    return torch.div(total, count)


def _audio(model: Any, codes: Tensor) -> Tensor:
    return codes[:, model.audio_offset : model.audio_offset + model.dep_q]
