"""Train the blocks on segments of recorded speech with Moshi's audio loss; the base model is frozen.

Shape legend: B streams, Q rows of the language model, T frames.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.apps.quickstart.data import Codec, Recording, Speech
from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.batches import Batch
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.injection import Injection
from moshi_ttt.data import dataset
from moshi_ttt.training import Callback, Step, TrainedModel, Trainer, start


@dataclass
class TrainingLog:
    """The audio loss (nats per token) and the gradient norm before clipping of each step."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0


class SpeechSegments:
    """Random segments of one long document in which Moshi says the recordings, in a new order each time."""

    def __init__(self, codec: Codec, speech: Speech, config: RunConfig) -> None:
        self.frames = math.ceil(round(config.duration_sec * codec.mimi.frame_rate, 6))
        total = sum(recording.frames for recording in speech.training)
        if self.frames > total:
            raise ConfigError(
                f"duration_sec is {config.duration_sec:g}, {self.frames} frames, and the training speech has {total} "
                f"frames. Set it to {total / codec.mimi.frame_rate:g} or less."
            )
        self.codec, self.rows = codec, config.batch_size
        self.recordings = list(speech.training)
        self.generator = random.Random(config.seed)

    def segment(self) -> Tensor:
        """``[Q, T]``."""
        chosen: list[Recording] = []
        first = self.generator.choice(self.recordings)
        start = self.generator.randrange(first.frames)
        needed = start + self.frames
        while needed > 0:
            chosen.append(self.generator.choice(self.recordings) if chosen else first)
            needed -= chosen[-1].frames
        return self.codec.document(chosen)[:, start : start + self.frames]

    def batches(self) -> Iterator[Batch]:
        """Batches of ``codes [B, Q, T]``, without end."""
        while True:
            codes = torch.stack([self.segment() for _ in range(self.rows)])
            yield dataset.CodesBatch(codes, torch.arange(self.rows), ())


@dataclass
class _Watch(Callback):
    """Record each step and switch updates; stop a training whose first step trains no parameter."""

    log: TrainingLog
    updates: bool
    on_step: Callable[[int, float], None]

    def around_step(self, trainer: Trainer, batches: Sequence[Batch]) -> AbstractContextManager[object]:
        return trainer.trained.host.updates(trainer.trained.model, self.updates)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        if not self.updates and step.gradient_norm == 0:
            trainer.outcome.stopped = True
            return
        self.log.losses.append(step.losses.plain["audio"])
        self.log.gradient_norms.append(step.gradient_norm)
        self.log.seconds += step.seconds
        self.on_step(step.number, self.log.losses[-1])


def train(
    model: Any,
    injection: Injection,
    batches: Iterator[Batch],
    config: RunConfig,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    updates: bool = True,
) -> TrainingLog:
    """Train the blocks in place and leave the model in eval mode. ``on_step(step, loss)`` is called after each step.

    ``updates=False`` trains them with their test-time updates off, which makes a control. Blocks that do nothing
    without updates have nothing to train then: the log is empty.

    Raises TrainingError when ``config.max_bad_steps`` steps in a row are not finite.
    """
    injection.freeze_base()
    log, host = TrainingLog(), injection.host
    with host.updates(model, updates):
        if not updates and not host.synthetic_loss(model, batch_size=1, length=8, seed=0).requires_grad:
            return log
    losses = host.losses(
        first_codebook=config.first_codebook_weight_multiplier, text_padding=config.text_padding_weight,
        text=config.text_weight,
    )  # fmt: skip
    roles = injection.plan.policy.roles(injection.plan.blocks[0].info.dtype)
    with start("cpu", None) as runtime:
        trainer = Trainer(TrainedModel(model, injection, roles, losses), config, runtime)
        trainer.fit(batches, [_Watch(log, updates, on_step)])
    model.eval()
    return log
