"""Read recordings of any common format as mono float32 samples at the codec's rate.

Shape legend: S samples, K codebooks, T frames.
"""

from __future__ import annotations

import math
import wave
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.data.audio_files import AudioError, read_header, read_samples

MIN_FRAMES = 2
"""A model of sequences needs something to predict and something to predict it from."""


def read_audio(path: str | Path, sample_rate: int) -> Tensor:
    """``[S]`` float32 on the CPU: channels averaged, resampled to ``sample_rate``.

    Raises AudioError: no such file, not audio, no samples, or samples that are not finite numbers.
    """
    path = Path(path)
    header = read_header(path, stretches=False)
    samples = read_samples(path, header, 0, header.samples)
    if samples.size == 0:
        raise AudioError(f"{path} has no samples. Give a recording that is not empty.")
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise AudioError(f"{path}: {bad} of {samples.size} samples are not finite numbers. Export the recording again.")
    return resample(torch.from_numpy(samples.mean(axis=0, dtype=np.float32)), header.rate, sample_rate)


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """``samples [S]`` at ``rate`` to ``[S * new_rate / rate]`` (rounded) at ``new_rate``, float32; nothing is late."""
    if rate == new_rate:
        return samples
    late = _delay(rate, new_rate)
    tail = math.ceil((late + 1) * rate / new_rate)  # pushes the last samples out of the resampler
    made = _resampled(F.pad(samples, (0, tail)), rate, new_rate)[late:]
    length = round(samples.numel() * new_rate / rate)
    return F.pad(made[:length], (0, max(0, length - made.numel())))


def _resampled(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """What the resampler makes: whole blocks, and later than what went in."""
    made = sphn.resample(samples[None].numpy(), rate, new_rate)[0]
    return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32))


@lru_cache(maxsize=32)
def _delay(rate: int, new_rate: int) -> int:
    """Samples at ``new_rate`` by which the resampler's output is late."""
    impulse = torch.zeros(2 * rate)
    impulse[rate] = 1.0
    return int(_resampled(impulse, rate, new_rate).argmax()) - new_rate


@torch.no_grad()
def encode(mimi: Any, samples: Tensor, *, name: str) -> Tensor:
    """Mimi's codes ``[K, T]`` (int64) of ``samples [S]``; a last frame that is not full is padded with silence.

    Raises AudioError when the recording ``name`` is shorter than two frames.
    """
    frames = samples.numel() / mimi.frame_size
    if frames < MIN_FRAMES:
        raise AudioError(
            f"{name} lasts {1000 * samples.numel() / mimi.sample_rate:.0f} ms, which is {frames:.2f} frames of "
            f"{1000 / mimi.frame_rate:.0f} ms; at least {MIN_FRAMES} are needed. Give a longer recording."
        )
    device = next(mimi.parameters()).device
    codes: Tensor = mimi.encode(samples[None, None].to(device))[0]
    return codes


@torch.no_grad()
def decode(mimi: Any, codes: Tensor) -> Tensor:
    """``[S]`` float32 samples of codes ``[K, T]``."""
    samples: Tensor = mimi.decode(codes[None])[0, 0]
    return samples.float().cpu()


def write_wav(path: Path, samples: Tensor, sample_rate: int) -> None:
    """16-bit wav of ``samples``: ``[S]``, or ``[C, S]`` of C channels; what exceeds [-1, 1] is clipped."""
    channels = samples[None] if samples.dim() == 1 else samples
    values = (channels.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy()  # [S, C]: interleaved
    with wave.open(str(path), "wb") as handle:
        handle.setnchannels(channels.shape[0])
        handle.setsampwidth(2)
        handle.setframerate(sample_rate)
        handle.writeframes(values.astype("<i2").tobytes())
