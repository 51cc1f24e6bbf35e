"""Training the blocks, the base model frozen: segments of recorded speech, Moshi's audio predicted.

Shape legend: B streams, Q rows of the language model, T frames.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moshi_ttt.apps.quickstart.data import Codec, Recording, Speech
from moshi_ttt.apps.quickstart.losses import training_loss
from moshi_ttt.configs.sections import TrainConfig
from moshi_ttt.core.errors import ConfigError, MoshiTTTError
from moshi_ttt.core.injection import Injection


class TrainingError(MoshiTTTError, RuntimeError):
    """Training that cannot go on."""


@dataclass
class TrainingLog:
    """What happened at each step: audio loss in nats per token, gradient norm before clipping."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Segments:
    """Random segments of one long document in which Moshi says the recordings in ever new order."""

    def __init__(self, codec: Codec, speech: Speech, config: TrainConfig) -> None:
        total = sum(recording.frames for recording in speech.training)
        if config.frames > total:
            raise ConfigError(
                f"train.frames is {config.frames}, and the training speech has {total} frames. "
                f"Set it to {total} or less."
            )
        self.codec, self.config = codec, config
        self.recordings = list(speech.training)
        self.generator = random.Random(config.seed)

    def segment(self) -> Tensor:
        """``[Q, T]``."""
        chosen: list[Recording] = []
        first = self.generator.choice(self.recordings)
        start = self.generator.randrange(first.frames)
        needed = start + self.config.frames
        while needed > 0:
            chosen.append(self.generator.choice(self.recordings) if chosen else first)
            needed -= chosen[-1].frames
        return self.codec.document(chosen)[:, start : start + self.config.frames]

    def batch(self) -> Tensor:
        """``[B, Q, T]``."""
        return torch.stack([self.segment() for _ in range(self.config.batch_size)])


def make_optimizer(injection: Injection, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with three groups: matrices (decayed), vectors, and gates (their own rate, not decayed)."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    gates = [gate for block in injection.blocks.values() for gate in block.gate_parameters()]
    known = {id(gate) for gate in gates}
    for parameter in injection.parameters():
        if id(parameter) not in known:
            (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": config.learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": config.gate_learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def train(
    model: Any,
    injection: Injection,
    segments: Segments,
    config: TrainConfig,
    *,
    on_step: Callable[[int, float], None],
    updates: bool = True,
) -> TrainingLog:
    """Train the blocks in place and leave the model in eval mode. ``on_step(step, loss)`` is called after each step.

    ``updates=False`` trains them with their test-time updates off, which makes a control. Blocks that do nothing
    without updates have nothing to train then: the log is empty.

    Raises TrainingError at the first loss or gradient that is not finite.
    """
    injection.freeze_base()
    parameters = list(injection.parameters())
    optimizer = make_optimizer(injection, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    log = TrainingLog()
    started = time.perf_counter()
    model.train()
    for step in range(config.steps):
        with injection.host.updates(model, updates):
            loss, audio = training_loss(model, segments.batch(), text_weight=config.text_weight)
        if not updates and not loss.requires_grad:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
        if not (math.isfinite(float(loss.detach())) and math.isfinite(norm)):
            raise TrainingError(_diagnosis(step, float(loss.detach()), norm, injection))
        if not updates and norm == 0:
            break
        optimizer.step()
        schedule.step()
        log.losses.append(float(audio))
        log.gradient_norms.append(norm)
        on_step(step + 1, log.losses[-1])
    model.eval()
    log.seconds = time.perf_counter() - started
    return log


def _rate(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine down to a tenth."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))


def _diagnosis(step: int, loss: float, norm: float, injection: Injection) -> str:
    def broken(tensor: Tensor | None) -> bool:
        return tensor is not None and not bool(tensor.isfinite().all())

    values = [name for name, parameter in injection.named_parameters() if broken(parameter)]
    gradients = [name for name, parameter in injection.named_parameters() if broken(parameter.grad)]
    where = f"not finite are parameters: {', '.join(values) or 'none'}; gradients: {', '.join(gradients) or 'none'}"
    return (
        f"Training stopped at step {step + 1}: loss {loss}, gradient norm {norm}; {where}. "
        "Lower train.learning_rate or the blocks' base_lr, or raise train.warmup; nothing was saved."
    )
