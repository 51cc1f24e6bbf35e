"""The losses of Moshi's language model on given tokens, frame by frame: streamed, or in segments as in training.

In streaming, attention reaches back its whole context at every frame. In segments, the state of the blocks is carried
from one to the next, and attention starts afresh in each. Nothing is sampled.

Shape legend: B recordings, Q rows (text, then audio), K codebooks Moshi speaks, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.deprecation import renamed_arguments
from moshi_ttt.core.host import CarriedState, HostModel
from moshi_ttt.hosts.moshi.losses import delayed, stream_losses_by_token

FRAMES_AT_ONCE = 64
"""Frames whose outputs are kept at a time, for the depformer."""


class FrameLosses(NamedTuple):
    """Nats per token at each frame, float64 on the CPU; NaN where nothing is predicted.

    Attributes:
        text: ``[B, T]``.
        audio: ``[B, T]``, the mean over the codebooks predicted there.
    """

    text: Tensor
    audio: Tensor


@renamed_arguments(piece="at_once")
@torch.no_grad()
def stream_losses(
    model: Any, codes: Tensor, *, before: Callable[[int], None] | None = None, at_once: int = FRAMES_AT_ONCE
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
        for first in range(0, codes.shape[2], at_once):
            steps = []
            for frame in range(first, min(first + at_once, codes.shape[2])):
                if before is not None:
                    before(frame)
                steps.append(model.forward_text(inputs[:, :, frame : frame + 1]))
            outputs = torch.cat([step[0] for step in steps], dim=1)  # [B, T, D]
            logits = torch.cat([step[1] for step in steps], dim=2)  # [B, 1, T, text codes]
            found = stream_losses_by_token(model, outputs, logits, targets[:, :, first : first + at_once])
            text.append(found[0])
            audio.append(found[1])  # [B, K, T]; K is 0 without a depformer
    # text [B, 1, T] and audio [B, K, T], each to [B, T]
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
    state: CarriedState | None = None
    found: list[FrameLosses] = []
    for first in range(0, codes.shape[2], frames):
        if between is not None and state is not None:
            state = between(first, state)
        part, state = forward_losses(model, codes[:, :, first : first + frames], host, state)
        found.append(part)
    return FrameLosses(*(torch.cat([each[place] for each in found], dim=1) for place in range(2)))


@torch.no_grad()
def forward_losses(
    model: Any, codes: Tensor, host: HostModel, state: CarriedState | None = None
) -> tuple[FrameLosses, CarriedState]:
    """The losses of ``codes [B, Q, T]`` in one plain forward pass from ``state``, and the state after it.

    None is the learned initial state. ``state`` itself is left as it is: any number of passes can start from it.
    """
    with host.carry(model, state) as after:
        found = host.losses().by_position(model, codes.to(model.device))
    return FrameLosses(*(found[name] for name in FrameLosses._fields)), after


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
