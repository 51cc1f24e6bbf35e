"""Audio of one connection: frames of samples from what a client sends, and messages from what Moshi says.

Shape legend: S samples of a frame.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import sphn
import torch
from torch import Tensor

from moshi_ttt.core.errors import MoshiTTTError
from moshi_ttt.serving.metrics import ServerMetrics
from moshi_ttt.serving.protocol import AudioFormat

Samples = npt.NDArray[np.float32]

PIECE = 256
"""Bytes that are decoded at a time: packets of three bytes can promise 40 ms each."""
MOST_SECONDS = 4.0
"""Sound that one message may hold. Moshi's clients send 40 ms, and a browser that was asleep a little more."""


class NotAudioError(MoshiTTTError, ValueError):
    """Bytes that are not what the connection was said to carry, in words for the client."""


class TooMuchAudioError(MoshiTTTError, ValueError):
    """A message with more sound than anybody says at once."""


class AudioIn(Protocol):
    def decode(self, payload: bytes) -> Samples:
        """Float32 samples of a message's payload. Raises NotAudioError and TooMuchAudioError."""


class AudioOut(Protocol):
    def encode(self, pcm: Tensor) -> bytes:
        """The payload of a message, of ``pcm [S]`` float32 in [-1, 1]; may be empty."""


class OpusIn:
    """Ogg pages with Opus. After one bad page the stream cannot be read any more."""

    def __init__(self, rate: int, metrics: ServerMetrics) -> None:
        self._reader = sphn.OpusStreamReader(rate)
        self._limit = int(MOST_SECONDS * rate)
        self._seconds = metrics.codec_seconds.labels(direction="decode")

    def decode(self, payload: bytes) -> Samples:
        begun = time.thread_time()
        samples = [np.zeros(0, np.float32)]
        for start in range(0, len(payload), PIECE):
            try:
                samples.append(self._reader.append_bytes(payload[start : start + PIECE]))
            except ValueError as error:
                raise NotAudioError(f"This is not Ogg with Opus: {error}.") from None
            if sum(len(each) for each in samples) > self._limit:
                raise TooMuchAudioError(f"One message may hold {MOST_SECONDS:g} s of sound. Send it as it is recorded.")
        self._seconds.inc(time.thread_time() - begun)
        return np.concatenate(samples).astype(np.float32, copy=False)


class OpusOut:
    def __init__(self, rate: int, metrics: ServerMetrics) -> None:
        self._writer = sphn.OpusStreamWriter(rate)
        self._seconds = metrics.codec_seconds.labels(direction="encode")

    def encode(self, pcm: Tensor) -> bytes:
        begun = time.thread_time()
        encoded = bytes(self._writer.append_pcm(pcm.numpy()))
        self._seconds.inc(time.thread_time() - begun)
        return encoded


class PcmIn:
    """16-bit samples, little-endian, mono."""

    def __init__(self, rate: int) -> None:
        self._limit = int(MOST_SECONDS * rate)

    def decode(self, payload: bytes) -> Samples:
        if len(payload) % 2:
            raise NotAudioError(f"Samples of 16 bits have an even number of bytes, and these are {len(payload)}.")
        if len(payload) // 2 > self._limit:
            raise TooMuchAudioError(f"One message may hold {MOST_SECONDS:g} s of sound. Send it as it is recorded.")
        samples: Samples = np.frombuffer(payload, "<i2").astype(np.float32)
        return samples / np.float32(32768)


class PcmOut:
    def encode(self, pcm: Tensor) -> bytes:
        return (pcm.clamp(-1, 1).numpy() * 32767).round().astype("<i2").tobytes()


def codecs(audio: AudioFormat, rate: int, metrics: ServerMetrics) -> tuple[AudioIn, AudioOut]:
    if audio == "opus":
        return OpusIn(rate, metrics), OpusOut(rate, metrics)
    return PcmIn(rate), PcmOut()


class Framer:
    """Cuts samples into frames ``[S]``, finite and in [-1, 1]; the rest waits for what comes next."""

    def __init__(self, frame_size: int) -> None:
        self._size = frame_size
        self._rest: Samples = np.zeros(0, np.float32)

    def frames(self, samples: Samples) -> Iterator[Tensor]:
        waiting = np.concatenate([self._rest, samples])
        whole = len(waiting) // self._size * self._size
        self._rest = waiting[whole:].copy()
        for start in range(0, whole, self._size):
            frame = np.nan_to_num(waiting[start : start + self._size], nan=0.0, posinf=1.0, neginf=-1.0)
            yield torch.from_numpy(np.clip(frame, -1, 1))
