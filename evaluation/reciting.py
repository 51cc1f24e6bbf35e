"""What Moshi loses on given tokens in the rows of ``Slots``: the streams of a server, nothing sampled.

``teacher_forcing`` streams a model by itself. Here the tokens go through the slots' own generation loop, so a row
begins with a saved memory and its memory is saved as a caller's is.

Shape legend: B rows, Q rows of the language model (text, Moshi's K codebooks, the user's), T frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.evaluation.teacher_forcing import FrameLosses, by_frame
from moshi_ttt.hosts.moshi.losses import delayed
from moshi_ttt.hosts.moshi.row_state import RowState
from moshi_ttt.hosts.moshi.slots import Slots, SlotSettings


@torch.no_grad()
def recite(
    slots: Slots, codes: Tensor, memories: Sequence[RowState | None], settings: SlotSettings | None = None
) -> FrameLosses:
    """Moshi says ``codes`` while the user is silent: the losses ``[B, T]``, NaN where nothing is predicted.

    Row b of the slots is joined, begins with ``memories[b]``, and says the text and Moshi's own codes of ``codes[b]``,
    each token in place of the one that the model would sample. The rows stay joined: their memories can be saved.

    Args:
        codes: ``[B, Q, T]`` int64; the user's codes in it are not used.
        memories: B of them; None is the learned start.
        settings: of every row.

    Raises ConfigError for another number of rows than the slots have, or a model on a GPU, whose captured steps sample
    for themselves; HostError for a memory that does not fit.
    """
    model = slots.model
    if not len(codes) == len(memories) == slots.count:
        raise ConfigError(
            f"{len(codes)} recordings, {len(memories)} memories, {slots.count} slots: give as many of each."
        )
    if model.device.type != "cpu":
        raise ConfigError(f"Reciting needs a model on the CPU, and this one is on {model.device}.")
    for row, memory in enumerate(memories):
        slots.join(row, settings or SlotSettings(), memory)
    said = delayed(model, codes)[:, : 1 + model.dep_q, 1:]  # [B, 1 + K, T]: what each step says
    silence = torch.zeros(slots.frame_size)
    with _saying(slots, said) as losses:
        for _ in range(said.shape[2] - 1):  # the first tick is two steps: a row's first one hears nothing
            slots.tick(dict.fromkeys(range(slots.count), silence))
    # T of [1 + K, B] -> [B, 1 + K, T]
    found = torch.stack([torch.stack(step) for step in losses]).permute(2, 1, 0).double()
    start = torch.tensor([model.text_initial_token_id, *[model.initial_token_id] * model.dep_q])
    nothing = (said == start[:, None]) | (said == model.zero_token_id)  # [1 + K, 1] over [B, 1 + K, T]
    found = found.masked_fill(nothing, torch.nan)
    return FrameLosses(found[:, 0], by_frame(model, found[:, 1:]))


@contextmanager
def _saying(slots: Slots, said: Tensor) -> Iterator[list[list[Tensor]]]:
    """Inside, every step of the slots takes the next of ``said [B, 1 + K, T]`` for its samples.

    Yields the loss ``[B]`` of each token of each step so far, the text first.
    """
    generator = slots._generator
    losses: list[list[Tensor]] = []

    def sample_text(logits: Tensor, token: int) -> Tensor:
        losses.append([])
        return take(logits, 0)

    def sample_audio(logits: Tensor, token: int) -> Tensor:
        return take(logits, 1 + token)

    def take(logits: Tensor, place: int) -> Tensor:
        """``[B]``, the token that is said; its loss under ``logits [B, V]`` is kept."""
        token = said[:, place, len(losses) - 1]
        known = (token >= 0) & (token < logits.shape[1])  # a start token is no token of the vocabulary
        losses[-1].append(F.cross_entropy(logits, torch.where(known, token, 0), reduction="none"))
        return token

    generator.text.sample, generator.audio.sample = sample_text, sample_audio  # type: ignore[method-assign]
    try:
        yield losses
    finally:
        del generator.text.sample, generator.audio.sample
