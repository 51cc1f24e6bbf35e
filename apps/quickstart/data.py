"""The speech of the quickstart: the recordings that ship with the tiny Moshi, encoded for its language model.

Shape legend: K codebooks of one speaker, T frames, Q rows of the language model (text, Moshi's K, the user's K).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.errors import HostError
from moshi_ttt.data.audio import encode, read_audio, resample
from moshi_ttt.hosts.moshi.compatibility import require_compatible

SPEEDS = (1.0, 0.94, 1.06)
"""Training uses every recording at these speeds too (the pitch changes): two minutes of speech are little."""
GAP_FRAMES = 4
"""Silence between two recordings of a document."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording: ``audio [K, T]`` codes and ``text [T]`` tokens, spread evenly over it (padding elsewhere)."""

    name: str
    seconds: float
    audio: Tensor
    text: Tensor

    @property
    def frames(self) -> int:
        return self.audio.shape[-1]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The codec and the tokenizer of one language model."""

    mimi: Any
    tokenizer: Any
    text_pad: int
    user_codebooks: int
    silence: Tensor

    @classmethod
    def of(cls, model: Any, mimi: Any, tokenizer: Any) -> Codec:
        """Raises HostError unless the three fit together, and the model predicts one of two voices."""
        layout = require_compatible(model, mimi, tokenizer)
        if (layout.voices, layout.predicted) != (2, 1):
            predicted = ("text alone", "its own voice", "both voices")[layout.predicted]
            raise HostError(
                f"The quickstart streams a recording as the user's voice into a Moshi that answers. This model reads "
                f"{layout.voices} voice(s) and predicts {predicted}. Give one that reads two and predicts its own, or "
                "use `moshi-ttt train` and `moshi-ttt evaluate`."
            )
        with torch.no_grad():  # the first frames of silence still hold the codec's start
            silence = mimi.encode(torch.zeros(1, 1, 40 * mimi.frame_size))[0][:, 20:]
        return cls(
            mimi=mimi, tokenizer=tokenizer, text_pad=model.text_padding_token_id,
            user_codebooks=model.n_q - model.dep_q, silence=silence,
        )  # fmt: skip

    def recording(self, path: Path, *, text: str = "", speed: float = 1.0) -> Recording:
        """Read and encode one file. Raises AudioError."""
        rate = int(self.mimi.sample_rate)
        samples = read_audio(path, rate)
        if speed != 1.0:
            samples = resample(samples, round(rate * speed), rate)
        audio = encode(self.mimi, samples, name=str(path))
        return Recording(
            name=path.stem, seconds=samples.numel() / rate, audio=audio,
            text=spread_text(self.tokenizer.encode(text), audio.shape[-1], self.text_pad),
        )  # fmt: skip

    def quiet(self, frames: int) -> Tensor:
        """``[K, frames]``: encoded silence."""
        return self.silence.repeat(1, frames // self.silence.shape[1] + 1)[:, :frames]

    def document(self, recordings: Sequence[Recording]) -> Tensor:
        """``[Q, T]`` for the language model: Moshi says the recordings one after the other, the user is silent."""
        parts: list[Tensor] = []
        for recording in recordings:
            text = F.pad(recording.text, (0, GAP_FRAMES), value=self.text_pad)
            moshi = torch.cat([recording.audio, self.quiet(GAP_FRAMES)], dim=1)
            parts.append(torch.cat([text[None], moshi]))
        spoken = torch.cat(parts, dim=1)
        return torch.cat([spoken, self.quiet(spoken.shape[1])])


@dataclass(frozen=True, kw_only=True)
class Speech:
    """Training recordings (each at several speeds) and the one that is held out from training."""

    training: tuple[Recording, ...]
    held_out: Recording

    @property
    def training_seconds(self) -> float:
        """Seconds of training speech, without the copies at other speeds."""
        return sum(recording.seconds for recording in self.training[:: len(SPEEDS)])


def load_speech(codec: Codec, files: Sequence[Path]) -> Speech:
    """The longest of ``files`` is held out, the others are for training; ``transcripts.json`` beside them has the text.

    Raises HostError when there are too few of them.
    """
    if len(files) < 2:
        raise HostError(f"The quickstart needs two recordings or more, found {len(files)}. Reinstall moshi-ttt.")
    texts = json.loads((files[0].parent / "transcripts.json").read_text(encoding="utf-8"))
    held_out = max(files, key=lambda path: path.stat().st_size)
    return Speech(
        training=tuple(
            codec.recording(path, text=texts.get(path.stem, ""), speed=speed)
            for path in files
            if path != held_out
            for speed in SPEEDS
        ),
        held_out=codec.recording(held_out, text=texts.get(held_out.stem, "")),
    )


def spread_text(tokens: Sequence[int], frames: int, padding: int) -> Tensor:
    """``[frames]``: the tokens at equal distances from the first frame on; those that find no frame are dropped."""
    text = torch.full((frames,), padding, dtype=torch.int64)
    kept = list(tokens)[:frames]
    for place, token in enumerate(kept):
        text[place * frames // len(kept)] = token
    return text
