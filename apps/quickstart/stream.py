"""Streaming: LMGen processes a recording token by token, and the blocks update their fast weights meanwhile.

Shape legend: Q rows of the language model, K codebooks of one speaker, T frames.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.apps.quickstart.data import Codec
from moshi_ttt.configs.sections import StreamConfig
from moshi_ttt.core.block import Site
from moshi_ttt.core.deprecation import moved_names
from moshi_ttt.evaluation.teacher_forcing import stream_losses
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.losses import delayed
from moshi_ttt.hosts.moshi.upstream import LMGen

__getattr__ = moved_names(__name__, __name__, {"listen": "stream_recording"})
WARM_UP_STEPS = 5
"""Left out of the timing: the first steps fill caches."""


@dataclass
class Streamed:
    """What came out of one stream.

    Attributes:
        tokens: ``[1 + K, T - delay]`` generated text and audio tokens.
        step_ms: time of each step.
        change: for each site, after each step, how far the fast weights are from where they started: the norm of
            the change over the norm of the learned initial fast weights.
        frame_ms: the time one frame of audio lasts.
    """

    tokens: Tensor
    frame_ms: float
    step_ms: list[float] = field(default_factory=list)
    change: dict[Site, list[float]] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms[WARM_UP_STEPS:] or self.step_ms)

    @property
    def real_time_factor(self) -> float:
        """Time a step takes over the time a frame lasts: below 1 is faster than real time."""
        return self.median_ms / self.frame_ms


@torch.no_grad()
def stream_recording(
    model: Any, codec: Codec, audio: Tensor, config: StreamConfig, *, on_frame: Callable[[int], None]
) -> Streamed:
    """Stream ``audio [K, T]`` as what the user says while Moshi answers; the blocks update throughout.

    Sampling draws from torch's global generator, seeded here and put back afterwards.
    """
    sampling = config.temperature > 0
    tokens: list[Tensor] = []
    result = Streamed(tokens=torch.empty(0), frame_ms=1000 / codec.mimi.frame_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = LMGen(
            model, use_sampling=sampling, temp=config.temperature, temp_text=config.temperature_text,
        )  # fmt: skip
        with generator.streaming(1):
            sites = block_sites(model)
            for frame in range(audio.shape[1]):
                started = time.perf_counter()
                out = generator.step(audio[None, :, frame : frame + 1])  # [1, K, 1] to [1, 1 + K, 1]
                result.step_ms.append(1000 * (time.perf_counter() - started))
                for site in sites:
                    buffers = site.get_streaming_state()[""].buffers
                    result.change.setdefault(site.site, []).append(float(site.block.drift(buffers)[0]))
                if out is not None:
                    tokens.append(out[0])
                on_frame(frame + 1)
    result.tokens = torch.cat(tokens, dim=1) if tokens else torch.empty(1 + codec.mimi.num_codebooks, 0).long()
    return result


def block_sites(model: Any) -> list[BlockSite]:
    """The modules that hold the blocks and, while the model streams, their state."""
    return [module for module in model.modules() if isinstance(module, BlockSite)]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The largest differences between the logits of training and of streaming on the same tokens, and their sizes."""

    frames: int
    dtype: str
    text: float
    audio: float
    text_scale: float
    audio_scale: float


@torch.no_grad()
def compare_with_training(model: Any, codes: Tensor) -> Agreement:
    """Compare one forward pass, as in training, with ``forward_text`` token by token, on ``codes [Q, T]``."""
    sequence = delayed(model, codes)[None]
    inputs, targets = sequence[:, :, :-1], sequence[:, :, 1:]
    whole, whole_text = model.forward_text(inputs)
    streamed, streamed_text = _token_by_token(model, inputs)
    whole_audio, streamed_audio = (model.forward_depformer_training(targets, out) for out in (whole, streamed))
    return Agreement(
        frames=inputs.shape[2],
        dtype=str(whole.dtype).removeprefix("torch."),
        text=float((whole_text - streamed_text).abs().max()),
        audio=float((whole_audio - streamed_audio).abs().max()),
        text_scale=float(whole_text.abs().max()),
        audio_scale=float(whole_audio.abs().max()),
    )


@torch.no_grad()
def loss_with_memory_cleared(model: Any, codes: Tensor, *, every: int) -> Tensor:
    """``[T]``: the audio loss of ``codes [Q, T]`` when all fast weights are reset every ``every`` frames.

    Attention keeps what it has: against the loss without resets, this is what the older memory is worth.
    """

    def clear(frame: int) -> None:
        if frame and frame % every == 0:
            for site in block_sites(model):
                site.reset_streaming()

    return stream_losses(model, codes[None], before=clear).audio[0]


def _token_by_token(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``forward_text`` of ``inputs [1, Q, T]`` in steps of one."""
    steps = []
    with model.streaming(1):
        for frame in range(inputs.shape[2]):
            steps.append(model.forward_text(inputs[:, :, frame : frame + 1]))
    outputs, text = (torch.cat([step[i] for step in steps], dim=1 + i) for i in (0, 1))
    return outputs, text
