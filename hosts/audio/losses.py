"""The denoiser's loss: mean squared error of its samples."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moshi_ttt.core.losses import HostLosses
from moshi_ttt.hosts.audio.model import AudioDenoiser, made_up_recordings


class AudioLosses(HostLosses):
    """One loss, ``denoising``; ``inputs`` are ``(noisy, clean)``, each ``[B, S]``, and every sample weighs 1."""

    names: ClassVar[tuple[str, ...]] = ("denoising",)
    in_nats: ClassVar[bool] = False

    def weights(self, model: AudioDenoiser, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.full((2, 1), inputs[1].numel(), dtype=torch.float64)

    def sums(self, model: AudioDenoiser, inputs: tuple[Tensor, Tensor]) -> Tensor:
        noisy, clean = inputs
        total = (model(noisy) - clean).float().square().sum()
        return torch.stack([total, total.detach()]).view(2, 1)


def denoising_loss(model: AudioDenoiser, batch: int, frames: int, seed: int) -> Tensor:
    """Mean squared error on synthetic recordings."""
    noisy, clean = (part.to(model.encode.weight) for part in made_up_recordings(batch, frames, model.frame, seed))
    return AudioLosses().total(model, (noisy, clean))
