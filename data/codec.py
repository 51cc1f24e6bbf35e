"""Encode recordings as tokens of one Moshi: its codec, its tokenizer, and the speaker of each channel.

Shape legend: C channels (1: Moshi; 2: Moshi, then the user), S samples, K codebooks of one channel, T frames.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.configs.speakers import MAIN_SPEAKER, Side
from moshi_ttt.data.audio import resample
from moshi_ttt.data.audio_files import AudioError, read_samples
from moshi_ttt.data.manifest import DURATION_SECONDS, read_header
from moshi_ttt.data.problems import DataError
from moshi_ttt.data.text import Word, text_stream
from moshi_ttt.hosts.moshi.compatibility import require_compatible
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, MoshiHostConfig

SAMPLED = 32
"""Values of each of Mimi's tensors that its fingerprint looks at."""


@dataclass(frozen=True, kw_only=True)
class SpeechCodec:
    """Encodes speech and words as tokens of one language model.

    Attributes:
        mimi: the codec, on any device; what it returns is brought to the CPU.
        tokenizer: a ``SentencePieceProcessor``.
        text_padding, end_of_padding: text tokens where nothing is said, and just before something is.
        zero_token: what stands where there is nothing to learn.
        channels: C.
        codebooks: K.
        moshi_channel: on which side of a stereo recording Moshi is; the user is on the other.
        speaker_label: whose words in a transcript are Moshi's.
        text_delay: seconds by which the text follows what is said; above 0 in models of speech to text.
    """

    mimi: Any
    tokenizer: Any
    text_padding: int
    end_of_padding: int
    zero_token: int
    channels: int
    codebooks: int
    text_delay: float = 0.0
    moshi_channel: Side = "left"
    speaker_label: str = MAIN_SPEAKER

    @classmethod
    def of(
        cls, model: Any, mimi: Any, tokenizer: Any, *, text_delay: float = 0.0, moshi_channel: Side = "left",
        speaker_label: str = MAIN_SPEAKER,
    ) -> SpeechCodec:  # fmt: skip
        """The codec of a language model, which may be on the meta device. Raises HostError unless they fit together."""
        layout = require_compatible(model, mimi, tokenizer)
        return cls(
            mimi=mimi, tokenizer=tokenizer, text_padding=model.text_padding_token_id,
            end_of_padding=model.end_of_text_padding_id, zero_token=model.zero_token_id,
            channels=layout.voices, codebooks=layout.codebooks, text_delay=text_delay, moshi_channel=moshi_channel,
            speaker_label=speaker_label,
        )  # fmt: skip

    @classmethod
    def load(
        cls, host: MoshiHostConfig, device: torch.device | str, *, require: Callable[[Any, str], None],
        model: Any = None, moshi_channel: Side = "left", speaker_label: str = MAIN_SPEAKER,
    ) -> SpeechCodec:  # fmt: skip
        """The codec of the model that ``host`` names, before any of the model's weights is read.

        ``model`` is its architecture where it is at hand. ``require`` is given it and its name, and raises HostError
        for one that cannot be used. Raises HostError as it does, and where files are missing or do not fit together.
        """
        if model is None:
            model = MOSHI_HOST.skeleton(host)
        require(model, host.hf_repo)
        bundle = host.bundle()
        return cls.of(
            model, bundle.load_mimi(device), bundle.tokenizer(), text_delay=bundle.text_delay,
            moshi_channel=moshi_channel, speaker_label=speaker_label,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Q: one row of text, then K of each channel."""
        return 1 + self.channels * self.codebooks

    def frames_of(self, seconds: float) -> int:
        """Frames of a recording; the last one need not be full."""
        return math.ceil(round(seconds * int(self.mimi.sample_rate)) / int(self.mimi.frame_size))

    def read_segment(self, path: Path, start_frame: int, frames: int) -> Tensor:
        """``[C, S]`` float32 at Mimi's rate: ``frames`` frames from ``start_frame`` on, or to the recording's end.

        Only this stretch is read, from the right sample on (see ``read_samples``). Moshi's channel comes first; a
        second channel that a recording does not have is silent.

        Raises DataError: not audio, too many channels, shorter than its header says, or samples that are not finite.
        """
        header = read_header(path)
        if header.channels > self.channels:
            raise DataError(f"{path} has {header.channels} channels, and this model takes at most {self.channels}.")
        rate, size = int(self.mimi.sample_rate), int(self.mimi.frame_size)
        length = min(frames * size, round(header.seconds * rate) - start_frame * size)
        if length <= 0:
            raise DataError(f"{path} ends before frame {start_frame}.")
        first = round(start_frame * size * header.rate / rate)
        wanted = min(round(frames * size * header.rate / rate), header.samples - first)
        try:
            samples = read_samples(path, header, first, wanted)
        except AudioError as error:
            raise DataError(str(error)) from None
        missing = wanted - samples.shape[1]
        if missing > DURATION_SECONDS * header.rate:
            raise DataError(
                f"{path} ends at {(first + samples.shape[1]) / header.rate:.2f} s, and its header says "
                f"{header.seconds:.2f} s. It was cut off: make it again."
            )
        if not np.isfinite(samples).all():
            raise DataError(f"{path} has samples that are not finite numbers. Export the recording again.")
        if samples.shape[0] == 2 and self.moshi_channel == "right":
            samples = samples[::-1].copy()  # [Moshi, user] as everywhere below
        # [C, S]: what is missing at the end, or of the channels, is silence
        spoken = F.pad(torch.from_numpy(samples), (0, missing, 0, self.channels - samples.shape[0]))
        return torch.stack([_at_rate(channel, header.rate, rate, length) for channel in spoken])

    @torch.no_grad()
    def encode_segment(self, samples: Tensor) -> Tensor:
        """Mimi's codes ``[C * K, T]`` (int64, CPU) of ``samples [C, S]``, T = S / frame size rounded up.

        Mimi starts afresh; a last frame that is not full is padded with silence.
        """
        device = next(self.mimi.parameters()).device
        padded = F.pad(samples, (0, -samples.shape[1] % int(self.mimi.frame_size)))
        codes: Tensor = self.mimi.encode(padded[:, None].to(device))  # [C, K, T]
        return codes.flatten(0, 1).to("cpu", torch.int64)

    def encode_text(self, words: Sequence[Word] | None, frames: int) -> Tensor:
        """The text row ``[frames]`` of a recording (see ``text_stream``); None, no transcript, is the zero token."""
        if words is None:
            return torch.full((frames,), self.zero_token, dtype=torch.int64)
        late = [word._replace(start=word.start + self.text_delay, end=word.end + self.text_delay) for word in words]
        return text_stream(
            late, frames, self.tokenizer, frame_rate=float(self.mimi.frame_rate),
            padding=self.text_padding, end_of_padding=self.end_of_padding,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Hexadecimal digits that differ between codecs that make other tokens of the same recording."""
        digest = hashlib.sha256()
        sizes = (self.channels, self.codebooks, self.text_padding, self.end_of_padding)
        digest.update(f"{sizes} {self.mimi.sample_rate} {self.mimi.frame_rate}".encode())
        if self.text_delay:
            digest.update(f"{self.text_delay}".encode())
        digest.update(self.tokenizer.serialized_model_proto())
        for name, tensor in sorted(self.mimi.state_dict().items()):
            step = max(1, tensor.numel() // SAMPLED)
            values = tensor.detach().flatten()[::step].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
        return digest.hexdigest()


def _at_rate(samples: Tensor, rate: int, new_rate: int, length: int) -> Tensor:
    """``[length]`` at ``new_rate`` of ``samples [S]`` at ``rate``."""
    made = resample(samples, rate, new_rate)[:length]
    return F.pad(made, (0, length - made.numel()))
