"""Moshi's losses: the one place where its cross-entropy is computed, for training, evaluation and checks.

The model's logits hold NaN where its delays leave nothing to predict, so tokens are picked by a mask and never
multiplied by it.

Shape legend: B rows, Q rows of codes (text, then audio), K codebooks Moshi speaks, T frames, V tokens of a codebook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.losses import HostLosses
from moshi_ttt.hosts.moshi.compatibility import layout_of


@dataclass(frozen=True, kw_only=True)
class MoshiLosses(HostLosses):
    """Cross-entropy of the text and of Moshi's audio tokens; ``inputs`` are codes ``[B, Q, T]`` int64.

    Attributes:
        first_codebook: weight of the first codebook of each voice, which carries meaning, beside 1 for the others.
        text_padding: weight of text padding beside 1 for words.
        text: coefficient of the text loss beside 1 for audio.
    """

    names: ClassVar[tuple[str, ...]] = ("text", "audio")
    first_codebook: float = 1.0
    text_padding: float = 1.0
    text: float = 1.0

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.text, 1.0)

    def weights(self, model: Any, inputs: Tensor) -> Tensor:
        text, audio = token_weights(model, inputs, self)
        return torch.stack([part.double().sum() for part in (text, audio, text > 0, audio > 0)]).view(2, 2)

    def sums(self, model: Any, inputs: Tensor) -> Tensor:
        check_codes(model, inputs)
        out = model(inputs)
        weighted, plain = [], []
        for logits, targets, mask, weight in zip(
            (out.text_logits, out.logits), targets_of(model, inputs), (out.text_mask, out.mask),
            token_weights(model, inputs, self), strict=True,
        ):  # fmt: skip
            losses = token_losses(logits, targets, mask)  # [N], one for each predicted token
            weighted.append((losses * weight[mask]).sum())
            plain.append((losses.detach() * (weight[mask] > 0)).sum())
        return torch.stack([torch.stack(weighted), torch.stack(plain)])

    @torch.no_grad()
    def by_position(self, model: Any, inputs: Tensor) -> dict[str, Tensor]:
        """Of one forward pass from start tokens on; a model without a depformer has no audio losses, all NaN."""
        check_codes(model, inputs)
        text, audio = losses_by_token(model, inputs)
        return {"text": text[:, 0], "audio": audio.nanmean(1)}  # [B, 1, T] -> [B, T]; [B, K, T] -> [B, T]


def check_codes(model: Any, codes: Any) -> None:
    """Raise HostError unless ``codes`` are ``[B, Q, T]`` integers with the Q rows of ``model``."""
    rows = int(model.num_codebooks)
    shape = tuple(codes.shape) if isinstance(codes, Tensor) else ()
    if len(shape) != 3 or shape[1] != rows or codes.dtype not in (torch.int64, torch.int32):
        given = f"{list(shape)} {codes.dtype}" if isinstance(codes, Tensor) else repr(codes)
        raise HostError(
            f"The losses are of codes [B, {rows}, T] int64, a row of text and {rows - 1} of audio, got {given}. "
            "moshi_ttt.data makes them from recordings (SpeechCodec), or take Mimi's codes with a text row before them."
        )


def token_losses(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """``[N]`` float32, nats: of the N tokens that ``mask [B, K, T]`` picks from ``targets [B, K, T]``, in its order.

    ``logits`` is ``[B, K, T, V]``.
    """
    return F.cross_entropy(logits[mask].float(), targets[mask], reduction="none")


def spread(losses: Tensor, mask: Tensor) -> Tensor:
    """``losses [N]`` where ``mask [B, K, T]`` is true: ``[B, K, T]`` float64 on the CPU, NaN elsewhere."""
    found = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    found[mask.cpu()] = losses.detach().double().cpu()
    return found


def targets_of(model: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """What the model predicts of ``codes [B, Q, T]``: text ``[B, 1, T]`` and its own audio ``[B, K, T]``."""
    return codes[:, :1], codes[:, model.audio_offset : model.audio_offset + model.dep_q]


def token_weights(model: Any, codes: Tensor, losses: MoshiLosses) -> tuple[Tensor, Tensor]:
    """``text [B, 1, T]`` and ``audio [B, K, T]`` float32: the weight of each token of ``codes [B, Q, T]``.

    Zero for what is not predicted: where the code is the zero token, and where a row's delay leaves no prediction.
    """
    first, last = model.audio_offset, model.audio_offset + model.dep_q
    text, audio = targets_of(model, codes)
    of_text = _predicted(model, text, model.delays[:1]).float()
    padding = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
    of_text = torch.where(padding, of_text * losses.text_padding, of_text)
    of_audio = _predicted(model, audio, model.delays[first:last]).float()
    of_audio[:, :: layout_of(model).codebooks] *= losses.first_codebook  # of each voice that is predicted
    return of_text, of_audio


def _predicted(model: Any, codes: Tensor, delays: list[int]) -> Tensor:
    """``[B, K, T]`` bool: where a token of ``codes [B, K, T]``, late by ``delays [K]``, is predicted."""
    time = torch.arange(codes.shape[-1], device=codes.device)
    last = codes.shape[-1] - torch.tensor(delays, device=codes.device)
    found: Tensor = (codes != model.zero_token_id) & (time < last[:, None])  # [K, T] beside [B, K, T]
    return found


def losses_by_token(model: Any, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Text ``[B, 1, T]`` and audio ``[B, K, T]`` of one forward pass, as ``spread`` gives them; K = 0 without audio."""
    text, audio = targets_of(model, codes)
    if model.depformer is None:  # its own forward pass needs one
        logits, targets, mask = _text_alone(model, codes)
        return spread(token_losses(logits, targets, mask), mask), spread(logits.new_empty(0), audio[:, :0] == 0)
    out = model(codes)
    return (
        spread(token_losses(out.text_logits, text, out.text_mask), out.text_mask),
        spread(token_losses(out.logits, audio, out.mask), out.mask),
    )


def _text_alone(model: Any, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, 1, T, V]``, targets and mask ``[B, 1, T]`` of a model that predicts text alone."""
    sequence = delayed(model, codes)
    logits = model.forward_text(sequence[:, :, :-1])[1]
    targets = sequence[:, :1, 1:]
    return logits, targets, can_be_predicted(model, targets, model.text_initial_token_id)


def can_be_predicted(model: Any, targets: Tensor, initial: int) -> Tensor:
    """``[B, K, T]`` bool: where a target of a delayed sequence is a token: not the zero token, nor the start token."""
    found: Tensor = (targets != model.zero_token_id) & (targets != initial)
    return found


def delayed(model: Any, codes: Tensor) -> Tensor:
    """``[..., Q, T + 1]``: a start token, then each row of ``codes [..., Q, T]`` late by its delay: Moshi's input."""
    rows = []
    for row, delay in enumerate(model.delays):
        start = model.text_initial_token_id if row == 0 else model.initial_token_id
        begin = codes.new_full((*codes.shape[:-2], 1 + delay), start)
        rows.append(torch.cat([begin, codes[..., row, : codes.shape[-1] - delay]], dim=-1))
    return torch.stack(rows, dim=-2)


def stream_losses_by_token(model: Any, outputs: Tensor, text_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Text ``[B, 1, T]`` and audio ``[B, K, T]``, their delays in, of steps that have been streamed.

    Args:
        outputs, text_logits: ``[B, T, D]`` and ``[B, 1, T, V]``, what ``forward_text`` gave at each step.
        targets: ``[B, Q, T]``, the next tokens of the delayed sequence.
    """
    text, audio = targets_of(model, targets)
    mask = can_be_predicted(model, text, model.text_initial_token_id)
    of_text = spread(token_losses(text_logits, text, mask), mask)
    if model.depformer is None:
        return of_text, spread(text_logits.new_empty(0), audio[:, :0] == 0)
    mask = can_be_predicted(model, audio, model.initial_token_id)
    return of_text, spread(token_losses(model.forward_depformer_training(targets, outputs), audio, mask), mask)


def made_up_loss(model: Any, codes: Tensor) -> Tensor:
    """The audio loss of ``codes [B, Q, T]``, or the text loss of a model that predicts text alone: a plain mean."""
    if model.depformer is None:
        return token_losses(*_text_alone(model, codes)).mean()
    out = model(codes)
    return token_losses(out.logits, targets_of(model, codes)[1], out.mask).mean()
