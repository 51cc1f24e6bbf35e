"""What ``moshi-ttt generate`` plays to Moshi: the recordings, how their results are called, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moshi_ttt.core.errors import ConfigError
from moshi_ttt.data.audio import read_audio, resample
from moshi_ttt.data.audio_files import AudioError, read_header, read_samples
from moshi_ttt.data.sources import recordings_in

UserChannel = Literal["left", "right", "mean"]
USER_CHANNELS: tuple[UserChannel, ...] = ("mean", "left", "right")
_NOT_OF_A_RECORDING = ("metrics", "report")
"""Stems of the files that describe all results."""


@dataclass(frozen=True)
class Take:
    """One recording, played with one seed.

    Attributes:
        name: of its files in the output folder, without a suffix; no other take has it.
    """

    name: str
    path: Path
    seed: int


def takes_of(paths: Sequence[Path], seeds: Sequence[int]) -> list[Take]:
    """Each recording with each seed; a folder stands for the recordings in it.

    A take is called by its file, and where there are several seeds by its seed, ``talk-seed3``; of several takes of one
    name the second is ``talk-2``. Raises ConfigError for a seed given twice, DataError for a folder without recordings.
    """
    if twice := sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        raise ConfigError(f"--seed is given twice: {', '.join(map(str, twice))}. The result would be the same.")
    files = [file for path in paths for file in (recordings_in(path) if path.is_dir() else [path])]
    taken = set(_NOT_OF_A_RECORDING)
    found = []
    for file in files:
        for seed in seeds:
            found.append(Take(_unused(file.stem + (f"-seed{seed}" if len(seeds) > 1 else ""), taken), file, seed))
    return found


def _unused(name: str, taken: set[str]) -> str:
    """``name``, or with the first number from 2 on that makes it new; small and capital letters are the same to it."""
    number, chosen = 1, name
    while chosen.casefold() in taken:
        number += 1
        chosen = f"{name}-{number}"
    taken.add(chosen.casefold())
    return chosen


def read_user(path: Path, sample_rate: int, channel: UserChannel) -> Tensor:
    """``[S]`` float32 at ``sample_rate``: the mean of a recording's channels, or one of the two of a stereo recording.

    Raises AudioError: as ``read_audio``, or a side is asked for and there are not two channels.
    """
    if channel == "mean":
        return read_audio(path, sample_rate)
    header = read_header(path, stretches=False)
    if header.channels != 2:
        raise AudioError(f"{path} has {header.channels} channel(s), so no {channel} one. Leave out --user-channel.")
    samples = read_samples(path, header, 0, header.samples)[USER_CHANNELS.index(channel) - 1]
    if not np.isfinite(samples).all():
        raise AudioError(f"{path} has samples that are not finite numbers. Export the recording again.")
    return resample(torch.from_numpy(np.ascontiguousarray(samples)), header.rate, sample_rate)
