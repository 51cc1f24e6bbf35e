"""One optimizer step: its report, the outcome of a run, and the undoing of a step that is given up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.core.losses import LossMeans
from moshi_ttt.core.sharding import local
from moshi_ttt.training.stopping import StepGivenUpError


class TrainingError(MoshiTTTError, RuntimeError):
    """Training that cannot continue. Every rank raises it alike."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step did, the same on every rank but for ``problems``, ``seconds`` and ``record``.

    Attributes:
        number: from 1.
        losses: over the global batch.
        gradient_norm: before clipping.
        learning_rates: group -> the rate that this step was made with.
        skipped: the loss or the gradient was not finite, and nothing was changed.
        stop: some rank was asked to stop.
        ready: every callback on every rank was ready before the step (``Callback.ready``).
        problems: data that could not be read on this rank.
        bad_segments: how many there were on all ranks.
        seconds: what the step took on this rank, reading its batches included.
        record: what callbacks add to the step's line in the log.
    """

    number: int
    losses: LossMeans
    gradient_norm: float
    learning_rates: Mapping[str, float]
    skipped: bool
    stop: bool
    ready: bool
    problems: tuple[str, ...]
    bad_segments: int
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        step: the last step made.
        stopped: a signal asked it to end before the last step and its evaluation.
        losses: the evaluation losses by step.
        checkpoint: the newest checkpoint.
    """

    step: int
    stopped: bool = False
    losses: dict[int, LossMeans] = field(default_factory=dict)
    checkpoint: Path | None = None


@contextmanager
def undone_if_given_up(buffers: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """When StepGivenUpError leaves this context, buffers and random generators are what they were before it."""
    random = _random_state(device)
    kept = {name: buffer.clone() for name, buffer in buffers.items()}  # a forward pass may change them
    try:
        yield
    except StepGivenUpError:
        _set_random_state(random, device)
        for name, buffer in buffers.items():
            buffer.copy_(kept[name])
        raise


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that a step may draw from: the CPU's, and the device's own."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def not_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The names of the tensors that hold NaN or infinity in this rank's part."""
    return [name for name, each in tensors.items() if each is not None and not bool(local(each).isfinite().all())]


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
