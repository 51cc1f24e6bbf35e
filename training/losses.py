"""The training loss of Moshi, as sums that add up over rows, micro-batches and ranks.

A token's weight follows from the codes alone, so the total weight of a step is known before its first forward pass, and
each micro-batch can divide by it: the loss is then a weighted mean over the whole global batch, wherever its rows are.

Shape legend: B rows, Q rows of codes (text, then audio), K codebooks Moshi speaks, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.hosts.moshi.fit import layout_of

SUMS = ("text", "audio", "text_nats", "audio_nats")
COUNTS = ("text", "audio", "text_tokens", "audio_tokens")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much tokens count.

    Attributes:
        first_codebook: weight of the first codebook of each voice, which carries meaning, beside 1 for the others.
        text_padding: weight of text padding beside 1 for words.
    """

    first_codebook: float
    text_padding: float


def token_weights(model: Any, codes: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """``text [B, 1, T]`` and ``audio [B, K, T]`` float32: what each token of ``codes [B, Q, T]`` counts.

    Zero for what is not predicted: where the code is the zero token, and where a row's delay leaves no prediction.
    """
    first, last = model.audio_offset, model.audio_offset + model.dep_q
    text, audio = codes[:, :1], codes[:, first:last]
    of_text = _predicted(model, text, model.delays[:1]).float()
    padding = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
    of_text = torch.where(padding, of_text * weights.text_padding, of_text)
    of_audio = _predicted(model, audio, model.delays[first:last]).float()
    of_audio[:, :: layout_of(model).codebooks] *= weights.first_codebook  # of each voice that is predicted
    return of_text, of_audio


def _predicted(model: Any, codes: Tensor, delays: list[int]) -> Tensor:
    time = torch.arange(codes.shape[-1], device=codes.device)
    last = codes.shape[-1] - torch.tensor(delays, device=codes.device)
    found: Tensor = (codes != model.zero_token_id) & (time < last[:, None])
    return found


def count(model: Any, codes: Tensor, weights: LossWeights) -> Tensor:
    """``[4]`` float64, named by ``COUNTS``: weight of text and audio in ``codes [B, Q, T]``, and numbers of tokens."""
    text, audio = token_weights(model, codes, weights)
    return torch.stack([part.double().sum() for part in (text, audio, text > 0, audio > 0)])


def loss_sums(model: Any, codes: Tensor, weights: LossWeights) -> Tensor:
    """``[4]`` float32, named by ``SUMS``: weighted text and audio losses, differentiable, and plain nats.

    The model's logits hold NaN where nothing is predicted, so tokens are picked and never multiplied away.
    """
    out = model(codes)
    of_text, of_audio = token_weights(model, codes, weights)
    audio = codes[:, model.audio_offset : model.audio_offset + model.dep_q]
    sums, nats = [], []
    for logits, targets, mask, weight in (
        (out.text_logits, codes[:, :1], out.text_mask, of_text),
        (out.logits, audio, out.mask, of_audio),
    ):
        losses = F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")
        sums.append((losses * weight[mask]).sum())
        nats.append((losses.detach() * (weight[mask] > 0)).sum())
    return torch.stack([*sums, *nats])
