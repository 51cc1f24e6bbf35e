"""The sections of a config file that belong to the apps rather than to a host or a block."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from moshi_ttt.core.config import FrozenConfig, Seed


class TrainConfig(FrozenConfig):
    """How quickstart trains the blocks; the base model is frozen.

    Attributes:
        steps: optimizer steps.
        batch_size, frames: one step sees ``batch_size`` segments of ``frames`` frames (12.5 frames are a second).
        learning_rate: of the blocks' parameters, at its highest: it warms up over ``warmup`` steps, then follows a
            half cosine down to a tenth.
        gate_learning_rate: the same for the gates, one number per channel that decides how much of a block is heard.
        weight_decay: on matrices only.
        clip: largest gradient norm.
        text_weight: weight of the text loss beside the audio loss.
        seed: of the choice of segments.
    """

    steps: int = Field(default=120, ge=1)
    batch_size: int = Field(default=2, ge=1)
    frames: int = Field(default=192, ge=4)
    learning_rate: float = Field(default=1e-3, gt=0.0)
    gate_learning_rate: float = Field(default=1e-2, gt=0.0)
    warmup: int = Field(default=5, ge=0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    clip: float = Field(default=1.0, gt=0.0)
    text_weight: float = Field(default=0.1, ge=0.0)
    seed: Seed = 0


class StreamConfig(FrozenConfig):
    """How quickstart streams a recording through LMGen.

    Attributes:
        seconds: how much of the recording is streamed; what is shorter is streamed whole.
        temperature, temperature_text: of sampling; 0 means the likeliest token.
        seed: of sampling.
    """

    seconds: float = Field(default=30.0, gt=0.0)
    temperature: float = Field(default=0.8, ge=0.0)
    temperature_text: float = Field(default=0.7, ge=0.0)
    seed: Seed = 0


SECTIONS: Mapping[str, type[FrozenConfig]] = {"train": TrainConfig, "stream": StreamConfig}
"""Top-level sections of a config file that the apps read, and what validates them."""
