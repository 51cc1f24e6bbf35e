"""The training material: recordings, clips of them presented twice, and the same with their frames in random order.

A clip in random order cannot be predicted in its first presentation, and can in its second: these train a memory to
recall. LoRA is trained on the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moshi_ttt.data.shards import rearrange_shards

MADE_BY = "moshi-ttt study"


def presented_twice(source: Path, out: Path, *, frames: int, step: int) -> None:
    """Write clips of ``frames`` frames of each recording, every ``step`` frames, each followed by itself."""

    def clips(length: int) -> Iterator[Tensor]:
        for start in range(0, length - frames + 1, step):
            yield torch.arange(start, start + frames).repeat(2)

    rearrange_shards(source, out, clips, made_by=MADE_BY)


def shuffled_twice(source: Path, out: Path, *, frames: int, step: int, seed: int) -> None:
    """Write as many clips, each of ``frames`` frames drawn from anywhere in a recording, and followed by itself."""
    generator = torch.Generator().manual_seed(seed)

    def clips(length: int) -> Iterator[Tensor]:
        for _ in range(0, length - frames + 1, step):
            yield torch.randperm(length, generator=generator)[:frames].repeat(2)

    rearrange_shards(source, out, clips, made_by=MADE_BY)
