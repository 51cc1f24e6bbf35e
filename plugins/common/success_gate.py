"""The success gate: it scales a memory's output by how well its last outputs predicted the tokens that followed.

s_t = cos(o_(t-1), v_t), and g_t = sigmoid(a + b sum_(j < taps) w_j s_(t-j)) multiplies what the memory adds at token
t. o_(t-1) is the memory's answer (its output) at the token before, and v_t the value that it predicted. The caller
aligns them: v_t must depend on no token after t. Before a stream's first token there is no answer: s = 0.

Shape legend: B streams, T tokens, H heads, d width of an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import row_mask

TAPS = 4
INITIAL_BIAS, INITIAL_SLOPE = -1.0, 4.0


class GateState(NamedTuple):
    """The state of a stream: the last ``answer [B, H, d]``, and the last ``scores [B, H, taps - 1]``, oldest first."""

    answer: Tensor
    scores: Tensor


def directions(x: Tensor) -> Tensor:
    """``x [..., d]`` over its norm, in its dtype; zero, with a gradient of zero, where it is (nearly) zero.

    Nearly: below the root of the smallest normal number (1e-19 in float32), where a gradient might not be finite. A
    vector with an element that is not finite gives NaN.
    """
    wide = x.float() if torch.finfo(x.dtype).bits < 32 else x
    # The direction does not depend on this factor, so it needs no gradient. With it no square is 0 or infinite.
    largest = wide.detach().abs().amax(-1, keepdim=True)
    nothing = largest < torch.finfo(wide.dtype).tiny ** 0.5
    scaled = torch.where(nothing, torch.ones_like(wide), wide / torch.where(nothing, 1, largest))
    return torch.where(nothing, 0, scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)).to(x.dtype)


def similarity(answers: Tensor, values: Tensor) -> Tensor:
    """``[...]``: the cosine of ``answers`` and ``values [..., d]``; zero where either is zero."""
    return (directions(answers) * directions(values)).sum(-1)


def initial_state(batch: int, heads: int, width: int, taps: int, dtype: torch.dtype, device: torch.device) -> GateState:
    """The state at the start of ``batch`` streams: no answer yet, so zeros."""
    answer = torch.zeros(batch, heads, width, dtype=dtype, device=device)
    return GateState(answer, torch.zeros(batch, heads, taps - 1, dtype=dtype, device=device))


class SuccessGate(nn.Module):
    """The parameters a and b ``[H]`` and w ``[H, taps]``, and the gate in calls and in streams.

    Args:
        dtype: the master dtype of a policy.
    """

    def __init__(
        self, heads: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None, taps: int = TAPS
    ) -> None:
        super().__init__()
        self.taps = taps
        self.bias = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.slope = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.weights = nn.Parameter(torch.empty(heads, taps, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """a = -1, b = 4, w = 1 / taps: the gate is 0.27 without an answer, 0.95 where all predictions were right."""
        assign(self.bias, torch.full(self.bias.shape, INITIAL_BIAS))
        assign(self.slope, torch.full(self.slope.shape, INITIAL_SLOPE))
        assign(self.weights, torch.full(self.weights.shape, 1 / self.taps))

    def forward(self, answers: Tensor, values: Tensor, state: GateState | None = None) -> tuple[Tensor, GateState]:
        """All tokens of a call at once.

        Args:
            answers: ``[B, T, H, d]``: the memory's output at each token.
            values: ``[B, T, H, d]``: the value at each token that the answer before it predicted.
            state: of the tokens before; None for a stream's start.

        Returns:
            ``[B, T, H, 1]`` in the dtype of ``answers``, and the state after the call, a new one.
        """
        batch, length, heads, width = answers.shape
        if state is None:
            state = initial_state(batch, heads, width, self.taps, answers.dtype, answers.device)
        given = torch.cat([state.answer[:, None], answers], dim=1)  # [B, 1 + T, H, d]: the answers before each token
        new = similarity(given[:, :-1], values)  # [B, T, H]
        scores = torch.cat([state.scores.mT, new], dim=1)  # [B, taps - 1 + T, H]
        gate = self._gate([scores[:, self.taps - 1 - j : self.taps - 1 - j + length] for j in range(self.taps)])
        # [B, T, H] -> [B, T, H, 1], and [B, taps - 1, H] -> [B, H, taps - 1]
        return gate[..., None], GateState(given[:, -1], scores[:, length:].mT)

    def step(self, answer: Tensor, value: Tensor, state: GateState, active: Tensor | None = None) -> Tensor:
        """``[B, H, 1]``: the gate of one token, with its ``answer`` and ``value`` ``[B, H, d]``; in place.

        The state of a row that is not ``active [B]`` stays as it is.
        """
        new = similarity(state.answer, value)
        scores = torch.cat([state.scores, new[..., None]], dim=-1)  # [B, H, taps]
        gate = self._gate([scores[..., self.taps - 1 - j] for j in range(self.taps)])
        for part, after in zip(state, (answer, scores[..., 1:]), strict=True):
            part.copy_(after if active is None else torch.where(row_mask(active, after), after, part))
        return gate[..., None]

    def _gate(self, scores: list[Tensor]) -> Tensor:
        """The gate ``[..., H]`` of the scores ``[..., H]`` of each token and of those 1, 2, ... tokens before it."""
        weights = self.weights.to(scores[0])
        total = scores[0] * weights[:, 0]
        for j, score in enumerate(scores[1:], start=1):
            total = torch.addcmul(total, score, weights[:, j])
        return torch.sigmoid(self.bias.to(total) + self.slope.to(total) * total)
