"""What the memory of one row has done: counts that Python keeps, and figures that are computed when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.state_ranges import LARGEST_COUNT
from moshi_ttt.hosts.moshi.streaming import BlockStreamState

RECENT = 12
"""Frames that the inner loss of a row is averaged over: about a second."""


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """What the memory of one row at one site has done since its learned start.

    Attributes:
        site, variant: which block.
        moved: how far the fast weights are from where they started, over the norm of the start (``block.drift``).
        inner_loss: mean over the latest frames and the heads, at the present fast weights; None for a variant without
            one, and where there are too few frames.
        start_loss: of the same frames at the learned start.
        updates: finished chunks that updates were enabled in, those that were skipped included; None where a block
            declares no chunk.
        skipped: updates (of tokens, where the variant skips those) that were skipped because they were not finite.
    """

    site: str
    variant: str
    moved: float
    inner_loss: float | None
    start_loss: float | None
    updates: int | None
    skipped: int


@dataclass
class RowCounts:
    """What is counted of a row, step by step, without reading a tensor.

    Attributes:
        frames: that the row heard.
        tokens: that its memory saw since the learned start: a frame each, and one before the first.
        updates: by chunk size in tokens, finished chunks since then in which updates were enabled for some token.
        enabled: by chunk size, whether they were for one of the unfinished chunk.
    """

    frames: int = 0
    tokens: int = 0
    updates: dict[int, int] = field(default_factory=dict)
    enabled: dict[int, bool] = field(default_factory=dict)

    def step(self, chunks: Iterable[int], enabled: bool) -> None:
        """Count one token of the memory, whose updates are ``enabled`` or not."""
        self.tokens += 1
        for chunk in chunks:
            any_enabled = enabled or self.enabled.get(chunk, False)
            done = self.tokens % chunk == 0
            self.updates[chunk] = self.updates.get(chunk, 0) + (done and any_enabled)
            self.enabled[chunk] = any_enabled and not done

    def problems(self) -> Iterator[str]:
        """Why no row has counted this."""
        for name, count in (("frames", self.frames), ("tokens", self.tokens)):
            if not 0 <= count <= LARGEST_COUNT:
                yield f"it counts {count} {name}, and 0 to {LARGEST_COUNT} are allowed"
        for chunk in sorted(self.updates.keys() | self.enabled.keys()):
            if chunk < 1:
                yield f"it counts updates in chunks of {chunk} tokens, and 1 or more are allowed"
            elif not 0 <= (updates := self.updates.get(chunk, 0)) <= max(0, self.tokens) // chunk:
                most = max(0, self.tokens) // chunk
                yield f"it counts {updates} updates, and its {self.tokens} tokens are {most} chunks of {chunk}"

    def copy(self) -> RowCounts:
        return RowCounts(self.frames, self.tokens, dict(self.updates), dict(self.enabled))

    def forget(self) -> None:
        """Count the memory from its learned start again."""
        self.tokens, self.updates, self.enabled = 0, {}, {}


@torch.no_grad()
def site_stats(state: BlockStreamState, row: int, counts: RowCounts, steps: int) -> SiteStats:
    """The figures of one row of one block, which made ``steps`` steps since its row was joined. Reads values."""
    block = state.block
    own = {name: tensor[row : row + 1] for name, tensor in state.buffers.items()}
    now = start = None
    if state.recent is not None and steps:
        tokens = min(steps, state.recent.x.shape[1])
        x, embeddings = (kept[row : row + 1, -tokens:] for kept in (state.recent.x, state.recent.embeddings))
        # Both in one call, as two rows: at these sizes a call costs more than what it computes.
        first = block.init_state(1, x.device)
        both = {name: torch.cat([tensor, first[name]]) for name, tensor in own.items()}  # [1, ...] twice -> [2, ...]
        context = BlockContext(input_embeddings=embeddings.expand(2, -1, -1))
        losses = block.recent_losses(x.expand(2, -1, -1), both, context)
        if losses is not None:
            now, start = _mean(losses[:1]), _mean(losses[1:])
    chunk = block.chunk_tokens
    return SiteStats(
        site=str(block.info.site), variant=str(block.config.variant), moved=float(block.drift(own)[0]), inner_loss=now,
        start_loss=start, updates=None if chunk is None else counts.updates.get(chunk, 0),
        skipped=int(block.skipped_updates(own)[0]),
    )  # fmt: skip


def _mean(losses: Tensor) -> float | None:
    """Over ``[1, H, T]``, without NaN; None where nothing is left."""
    if bool(losses.isnan().all()):
        return None
    return float(losses.nanmean())
