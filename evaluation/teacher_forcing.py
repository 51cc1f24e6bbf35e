"""What Moshi's language model loses on given tokens, frame by frame: streamed token by token, or as training hears it.

Streaming sees what a listener's Moshi sees: attention reaches back its whole context at every frame, memory as far as
it likes. Training sees one segment at a time: memory is carried to the next, attention is not. Nothing is sampled.

Shape legend: B recordings, Q rows (text, then audio), K codebooks Moshi speaks, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.host import CarriedState, HostModel

PIECE = 64
"""Frames whose outputs are kept at a time, for the depformer."""


class FrameLosses(NamedTuple):
    """Nats per token at each frame, float64 on the CPU; NaN where nothing is predicted.

    Attributes:
        text: ``[B, T]``.
        audio: ``[B, T]``, the mean over the codebooks predicted there.
    """

    text: Tensor
    audio: Tensor


def delayed(model: Any, codes: Tensor) -> Tensor:
    """``[..., Q, T + 1]``: a start token, then each row of ``codes [..., Q, T]`` late by its delay: Moshi's input."""
    rows = []
    for row, delay in enumerate(model.delays):
        start = model.text_initial_token_id if row == 0 else model.initial_token_id
        begin = codes.new_full((*codes.shape[:-2], 1 + delay), start)
        rows.append(torch.cat([begin, codes[..., row, : codes.shape[-1] - delay]], dim=-1))
    return torch.stack(rows, dim=-2)


@torch.no_grad()
def stream_losses(
    model: Any, codes: Tensor, *, before: Callable[[int], None] | None = None, piece: int = PIECE
) -> FrameLosses:
    """The losses of ``codes [B, Q, T]``, each row a stream of its own; ``before(frame)`` is called before each frame.

    Where a code is the zero token nothing goes in and nothing is predicted. The streaming state is made here and gone
    afterwards.
    """
    codes = codes.to(model.device)
    sequence = delayed(model, codes)
    inputs, targets = sequence[:, :, :-1], sequence[:, :, 1:]
    text, audio = [], []
    with model.streaming(codes.shape[0]):
        for first in range(0, codes.shape[2], piece):
            steps = []
            for frame in range(first, min(first + piece, codes.shape[2])):
                if before is not None:
                    before(frame)
                steps.append(model.forward_text(inputs[:, :, frame : frame + 1]))
            outputs = torch.cat([step[0] for step in steps], dim=1)
            logits = torch.cat([step[1] for step in steps], dim=2)
            wanted = targets[:, :, first : first + piece]
            text.append(_token_losses(logits, wanted[:, :1], (model.zero_token_id, model.text_initial_token_id)))
            audio.append(_audio_losses(model, outputs, wanted))  # [B, K, T]; K is 0 without a depformer
    return FrameLosses(torch.cat(text, dim=2)[:, 0], by_frame(model, torch.cat(audio, dim=2)))


@torch.no_grad()
def segment_losses(
    model: Any,
    codes: Tensor,
    host: HostModel,
    *,
    frames: int,
    between: Callable[[int, CarriedState], CarriedState | None] | None = None,
) -> FrameLosses:
    """The losses of ``codes [B, Q, T]`` in plain forward passes of ``frames`` frames, the last one of what is left.

    Memory is carried from segment to segment, each row's own. All else restarts, as it does in training: a segment
    begins with start tokens, attention sees nothing before it, and the late codebooks of its last frames are not
    predicted. ``between(frame, state)`` is called where a segment other than the first begins, and returns the state to
    begin it from; None is the learned initial one. What was carried is gone afterwards.
    """
    codes = codes.to(model.device)
    state: CarriedState | None = None
    text, audio = [], []
    for first in range(0, codes.shape[2], frames):
        if between is not None and state is not None:
            state = between(first, state)
        segment = codes[:, :, first : first + frames]
        with host.carry(model, state) as after:
            losses = _text_alone(model, segment) if model.depformer is None else _of_forward(model, segment)
        text.append(losses.text)
        audio.append(losses.audio)
        state = after
    return FrameLosses(torch.cat(text, dim=1), torch.cat(audio, dim=1))


def _of_forward(model: Any, codes: Tensor) -> FrameLosses:
    """The losses of ``codes [B, Q, T]`` in one forward pass as training makes it."""
    out = model(codes)
    spoken = codes[:, model.audio_offset : model.audio_offset + model.dep_q]
    text = _masked_losses(model, out.text_logits, codes[:, :1], out.text_mask)[:, 0]
    return FrameLosses(text, _masked_losses(model, out.logits, spoken, out.mask).nanmean(1))


def _text_alone(model: Any, codes: Tensor) -> FrameLosses:
    """The same for a model without a depformer, whose own forward pass needs one."""
    sequence = delayed(model, codes)
    _, logits = model.forward_text(sequence[:, :, :-1])  # [B, 1, T, text_card]
    losses = _token_losses(logits, sequence[:, :1, 1:], (model.zero_token_id, model.text_initial_token_id))
    return FrameLosses(losses[:, 0], torch.full_like(losses[:, 0], torch.nan))


def _masked_losses(model: Any, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """``[B, K, T]`` float64 on the CPU, of ``logits [B, K, T, card]``; NaN where ``mask [B, K, T]`` is false."""
    zero = model.zero_token_id
    return _token_losses(logits, torch.where(mask, targets, zero), (zero, zero))


def _audio_losses(model: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """``[B, K, T]``: losses of the audio tokens of ``targets [B, Q, T]``, given ``outputs [B, T, D]``."""
    if model.depformer is None:
        return torch.empty(targets.shape[0], 0, targets.shape[2], dtype=torch.float64)
    logits = model.forward_depformer_training(targets, outputs)
    wanted = targets[:, model.audio_offset : model.audio_offset + model.dep_q]
    return _token_losses(logits, wanted, (model.zero_token_id, model.initial_token_id))


def _token_losses(logits: Tensor, targets: Tensor, never: tuple[int, int]) -> Tensor:
    """``[B, K, T]`` float64 on the CPU, of ``logits [B, K, T, card]``; NaN where the target is one of ``never``."""
    missing = (targets == never[0]) | (targets == never[1])
    losses = F.cross_entropy(logits.float().movedim(-1, 1), torch.where(missing, 0, targets), reduction="none")
    return losses.double().masked_fill(missing, torch.nan).cpu()


def by_frame(model: Any, losses: Tensor) -> Tensor:
    """``[B, T]``: the mean over codebooks of ``losses [B, K, T]`` at the frame they belong to, their delays undone.

    NaN where there are none.
    """
    if not losses.shape[1]:
        return losses.new_full((losses.shape[0], losses.shape[2]), torch.nan)
    delays = model.delays[model.audio_offset : model.audio_offset + model.dep_q]
    rows = []
    for row, delay in zip(losses.unbind(1), delays, strict=True):
        rows.append(F.pad(row[:, delay:], (0, delay), value=torch.nan))  # its last codes are never predicted
    return torch.stack(rows).nanmean(0)
