"""Inner losses by position, measured while a model runs: sums over calls, and curves of each block.

Figure 5 of Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620. `evaluate inner-loop` and a run of
training use this.

Shape legend: B rows of a call, H heads of a block, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site

CURVES = {
    "initial": "initial weights", "before": "before the chunk's update", "after": "after the chunk's update",
    "baseline": "mean target",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SiteCurves:
    """What one block did.

    Attributes:
        by_position: by the names of ``CURVES``, ``[H, T]`` float64: means over the recordings that have a value there,
            NaN where none has.
        first_updated: the first position whose weights differ from the initial ones; T when no update took effect.
        means: by the names of ``CURVES``, ``[H]``: over the same tokens for each, those of whole chunks from
            ``first_updated`` on, of all recordings; NaN when there are none.
        tokens: how many those are, in one head.
        not_finite: losses at ``initial`` or ``before`` that are no numbers, over all heads and recordings.
    """

    site: str
    variant: str
    by_position: dict[str, Tensor]
    first_updated: int
    means: dict[str, Tensor]
    tokens: int
    not_finite: int


class Sums:
    """Sums over the recordings of one site, by position: all values, and those of tokens that have all four."""

    def __init__(self, block: SequenceBlock, frames: int) -> None:
        self.block = block
        self.frames = self.first_updated = frames
        self.not_finite = 0
        self.values: dict[str, Tensor] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """``losses``: by the names of ``CURVES``, ``[B, H, T]``, T at most all frames."""
        stacked = torch.stack([losses[name] for name in CURVES]).double()
        initial, before = stacked[0], stacked[1]
        moved = (initial != before).flatten(0, 1).any(0).nonzero()
        if len(moved):
            self.first_updated = min(self.first_updated, int(moved[0]))
        self.not_finite += int((~stacked[:2].isfinite()).sum())
        whole = stacked.isfinite().all(0)
        found = {
            "sum": stacked.nan_to_num(0, torch.inf, -torch.inf).sum(1), "count": (~stacked.isnan()).sum(1),
            "whole_sum": torch.where(whole, stacked, 0).sum(1), "whole_count": whole.sum(0),
        }  # fmt: skip
        for name, value in found.items():
            if name not in self.values:
                self.values[name] = torch.zeros(*value.shape[:-1], self.frames, dtype=torch.float64)
            self.values[name][..., : value.shape[-1]] += value.cpu()

    def curves(self, site: Site) -> SiteCurves:
        sums, counts = self.values["whole_sum"], self.values["whole_count"]
        total, tokens = sums[..., self.first_updated :].sum(-1), counts[:, self.first_updated :].sum(-1)
        positions = self.values["sum"] / self.values["count"]
        return SiteCurves(
            site=str(site), variant=str(self.block.config.variant),
            by_position=dict(zip(CURVES, positions, strict=True)), first_updated=self.first_updated,
            means=dict(zip(CURVES, total / tokens, strict=True)), tokens=int(tokens.max()), not_finite=self.not_finite,
        )  # fmt: skip


@contextmanager
def measured(sums: Mapping[Site, Sums]) -> Iterator[None]:
    """Add the inner losses of each block to its sums whenever a forward pass calls it."""

    def measure(into: Sums) -> Any:
        @torch.no_grad()
        def hook(block: SequenceBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # inside a backward: activation checkpointing repeats the call, which has been measured
            x = kwargs["x"] if "x" in kwargs else args[0]
            context = kwargs.get("context") or (args[2] if len(args) > 2 else None) or BlockContext()
            layout = block.info.format
            context = replace(context, coordinates=layout.coordinates(x))
            if losses := block.inner_losses(layout.to_tokens(x), context):
                into.add(losses)

        return hook

    hooks = []
    try:
        for into in sums.values():
            hooks.append(into.block.register_forward_hook(measure(into), with_kwargs=True, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
