"""A denoiser for mono audio: frames of samples in, frames of samples out, attention over all of the recording.

Shape legend: B recordings, S samples, T = S / frame frames, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock


class AudioLayer(nn.Module):
    """Attention over all frames, the block if there is one, a feed-forward; all on a residual stream ``[B, T, D]``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.ttt: SequenceBlock | None = None

    def forward(self, x: Tensor, embeddings: Tensor, updates: bool | Tensor, volume: float | Tensor) -> Tensor:
        heard = self.norm_attention(x)
        x = x + cast(Tensor, self.attention(heard, heard, heard, need_weights=False)[0])
        if self.ttt is not None:
            context = BlockContext(input_embeddings=embeddings, updates=updates, volume=volume, want_state=False)
            x = self.ttt(x, None, context)[0]
        return x + cast(Tensor, self.mlp(self.norm_mlp(x)))


class AudioDenoiser(nn.Module):
    """``[B, S]`` noisy samples to ``[B, S]`` clean ones; S is a multiple of ``frame``."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, frame: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.frame = dim, num_heads, frame
        self.encode, self.decode = nn.Linear(frame, dim), nn.Linear(dim, frame)
        self.layers = nn.ModuleList(AudioLayer(dim, num_heads) for _ in range(num_layers))
        self.updates: bool | Tensor = True
        """Whether the blocks' test-time updates are enabled, for all rows or ``[B]`` bool."""
        self.volume: float | Tensor = 1.0
        """Of what the blocks add, for all rows or ``[B]``."""

    def forward(self, samples: Tensor) -> Tensor:
        x = embeddings = self.encode(samples.unflatten(1, (-1, self.frame)))
        for layer in self.layers:
            x = layer(x, embeddings, self.updates, self.volume)
        return samples + cast(Tensor, self.decode(x)).flatten(1)


def made_up_recordings(batch: int, frames: int, frame: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(noisy, clean)``, each ``[batch, frames * frame]``: steady tones under white noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(frames * frame)
    pitch = 0.02 + 0.3 * torch.rand(batch, 3, 1, generator=generator)
    phase = 6.283 * torch.rand(batch, 3, 1, generator=generator)
    clean = torch.sin(pitch * time + phase).mean(1)
    return clean + 0.5 * torch.randn(clean.shape, generator=generator), clean
