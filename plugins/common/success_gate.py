"""A gate that trusts a memory which has just predicted well.

    s_t = o_(t-1) . v_t / sqrt(|o_(t-1)|^2 |v_t|^2 + 1e-6)     how well the last read-out met what then came
    g_t = sigmoid(a + b * sum over j of w_j s_(t-j))           j = 0 .. J - 1

with o the memory's read-outs and v the values that they predict: s is their cosine, and zero where either is zero, for
nothing said is no success. A stream keeps the last read-out and the last J - 1 scores.

Shape legend: B streams, T tokens, H heads, d value width, J taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TAPS = 4


@dataclass
class SuccessGate:
    """Offset a and slope b ``[H]`` and taps w ``[H, J]``."""

    offset: Tensor
    slope: Tensor
    taps: Tensor

    def __call__(
        self, read: Tensor, value: Tensor, last_read: Tensor, last_scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gate of each token, and what a stream keeps after them.

        Args:
            read: o ``[B, T, H, d]``, said at each token about the value of the next.
            value: v ``[B, T, H, d]``, known at each token.
            last_read: ``[B, H, d]``, said at the token before these; zero at a stream's start.
            last_scores: ``[B, H, J - 1]``, of the tokens before these, oldest first.

        Returns:
            ``[B, T, H, 1]``, and the two last arguments after the last token.
        """
        said = torch.cat([last_read[:, None], read[:, :-1]], dim=1)
        scores = cosine(said, value)  # [B, T, H]
        # [B, J - 1 + T, H]: the scores of the tokens before, then of these
        padded = torch.cat([last_scores.mT, scores], dim=1)
        kernel = self.taps.shape[1]
        # [B, T, H, J], newest last; the taps have lag 0 first
        windows = padded.unfold(1, kernel, 1)
        mean = (windows * self.taps.flip(1)).sum(-1)
        gate = torch.sigmoid(self.offset + self.slope * mean)
        return gate[..., None], read[:, -1], padded[:, scores.shape[1] :].mT


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """``[...]``: a . b / sqrt(|a|^2 |b|^2 + 1e-6) for ``a`` and ``b [..., d]``: smooth, and zero where either is."""
    return (a * b).sum(-1) * (a.square().sum(-1) * b.square().sum(-1) + 1e-6).rsqrt()
