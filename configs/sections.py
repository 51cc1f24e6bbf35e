"""The sections of a config file that belong to quickstart: how it streams, and the ``train`` of earlier versions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import Field

from moshi_ttt.core.config import FrozenConfig, Seed

FRAMES_PER_SEC = 12.5


class TrainConfig(FrozenConfig):
    """The ``train`` section that quickstart had before its config was that of a training run; ``renamed`` reads it.

    Attributes:
        steps: optimizer steps.
        batch_size, frames: one step sees ``batch_size`` segments of ``frames`` frames (12.5 frames are a second).
        learning_rate: of the blocks' parameters, at its highest: it warms up over ``warmup`` steps, then follows a
            half cosine down to a tenth.
        gate_learning_rate: the same for the gates, one number per channel that scales the output of a block.
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


def renamed(old: TrainConfig) -> dict[str, Any]:
    """What the keys that ``old`` was given are in the config of a training run; a warning shows them."""
    given = {name: getattr(old, name) for name in old.model_fields_set}
    new: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    same = {"steps": "max_steps", "clip": "max_norm", "batch_size": "batch_size", "text_weight": "text_weight"}
    for name, value in given.items():
        if name == "frames":
            new["duration_sec"] = value / FRAMES_PER_SEC
        elif name in ("learning_rate", "gate_learning_rate"):
            group = "ttt" if name == "learning_rate" else "gates"
            optim.setdefault("lr_groups", {})[group] = value
        elif name == "warmup":
            optim["pct_start"] = round(min(1.0, value / old.steps), 6)
        elif name == "weight_decay":
            optim["weight_decay"] = value
        else:
            new[same.get(name, name)] = value
    if optim:
        new["optim"] = optim
    if new:
        warnings.warn(
            "the section 'train' is of an earlier version: quickstart's config is that of a training run, as in "
            f"configs/quickstart.yaml. Replace 'train' by:\n{yaml.safe_dump(new, sort_keys=False).rstrip()}",
            FutureWarning,
            stacklevel=2,
        )
    return new


SECTIONS: Mapping[str, type[FrozenConfig]] = {"train": TrainConfig, "stream": StreamConfig}
"""Top-level sections of a config file that the apps read, and what validates them."""
