"""The inputs of one call of a block, besides its activations and its state.

Shape legend: B streams, T tokens, D width of the host's activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshi_ttt.core import state as states
from moshi_ttt.core.casts import ParameterCasts
from moshi_ttt.core.segments import Segments


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """Inputs besides the activations; some blocks need some of them.

    Attributes:
        input_embeddings: ``[B, T, D]``, the host's token embeddings of the same tokens.
        exec_mask: ``[B]`` bool; a row where it is false keeps its state (its output means nothing).
        reset: ``[B]`` bool; a row where it is true starts from the learned initial state before this call.
        token_mask: ``[B, T]`` bool; a token where it is false takes no part (padding): its output is the base model's,
            the state does not change, and it takes no place in a chunk. Rows may differ.
        starts: ``[B, T]`` bool; before a token where it is true its row goes back to the learned initial state, and a
            chunk begins there (a document in a packed row). A start counts whether or not its token is masked.
        segments: ``Segments.read(token_mask, starts)``, where a host has read them already; of a call of several tokens
            without it, every block reads them.
        updates: False disables test-time updates for the tokens of this call; ``[B]`` bool does so row by row. What
            earlier tokens of an unfinished chunk contribute still takes effect when the chunk ends. Nothing decays with
            tokens, or with whole chunks, whose updates are disabled.
        volume: what the block adds to the base model is multiplied by it: a number from 0 to 10, or ``[B]`` floating
            point, one for each row. The state does not depend on it.
        coordinates: ``[T, axes]`` int64, where each token is on the host's grid; the block's format sets it.
        prefix: tokens at the beginning that a reversed pass leaves in front, in order; the block's format may set it.
        want_state: False if the state after this call is not used: a block may then return an empty one.
        detach_state: True when the state after this call is to be cut from the graph. A block may then make it in place
            and without what a gradient through it would need.
        casts: where ``cast`` keeps its results from step to step; a host gives it while it streams.
    """

    input_embeddings: Tensor | None = None
    exec_mask: Tensor | None = None
    reset: Tensor | None = None
    token_mask: Tensor | None = None
    starts: Tensor | None = None
    segments: Segments | None = None
    updates: bool | Tensor = True
    volume: float | Tensor = 1.0
    coordinates: Tensor | None = None
    prefix: int = 0
    want_state: bool = True
    detach_state: bool = False
    casts: ParameterCasts | None = None

    @property
    def cuts(self) -> bool:
        """Whether tokens of this call are masked, or reset their row."""
        return self.token_mask is not None or self.starts is not None

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """``parameter.to(dtype)``, the same bits; while a host streams, by a copy that is made once.

        For the block's own parameters and buffers. A parameter that changes in the middle of a stream is cast anew.
        Do not keep what this returns: ask in every step. Outside streams gradients pass as through ``to``.
        """
        return parameter.to(dtype) if self.casts is None else self.casts.get(parameter, dtype)

    def updates_mask(self, like: Tensor) -> Tensor | None:
        """``updates`` as ``[B]`` bool on the device of ``like [B, ...]``; None where they are enabled for all rows."""
        if isinstance(self.updates, Tensor):
            return self.updates
        return None if self.updates else torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)

    def where_updated(self, value: Tensor) -> Tensor:
        """``value [B, ...]`` where test-time updates are enabled, zero elsewhere: for a rate, or for an update."""
        if isinstance(self.updates, Tensor):
            return torch.where(states.row_mask(self.updates, value), value, 0)
        return value if self.updates else torch.zeros_like(value)
