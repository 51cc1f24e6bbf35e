"""Health of blocks during training: figures that are measured and kept on the device, and read on request.

A block says what to measure (``SequenceBlock.statistics``) and what of it is a red flag (``red_flags``). A monitor
measures one call of each block; nothing is read on the host until ``read``.

Shape legend: B streams, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site
from moshi_ttt.core.state import BlockState

LEAST_DRIFT_EXPLODED = 100.0
LEAST_SAMPLE = 64
"""Tokens of a row that a sample has at least."""


def chunk_of(block: SequenceBlock) -> int:
    """Tokens between two updates, for a block whose config says so; else 1."""
    return block.info.tokens(getattr(block.config, "chunk", 1))


def sample_length(block: SequenceBlock) -> int:
    """Tokens of a row that a health check measures: two chunks and a token, and at least ``LEAST_SAMPLE``."""
    return max(LEAST_SAMPLE, 1 + 2 * chunk_of(block))


@dataclass
class BlockHealth:
    """The figures of one block, and a sentence for each red flag; none when it is healthy."""

    figures: dict[str, float] = field(default_factory=dict)
    red_flags: list[str] = field(default_factory=list)


class HealthMonitor:
    """Measures the first call of every block it is given inside ``with monitor:``, and the first after each ``read``.

    Only training's calls are measured (plain and carried), not streaming steps. Later calls cost nothing: other
    micro-batches, and a layer that activation checkpointing runs again in backward.

    Output, state and drift are measured whole, in float64 sums that copy nothing. ``statistics`` compute parts of the
    block again.

    Args:
        blocks: what to measure.
        sample: give ``statistics`` the first ``sample_length`` tokens of each row alone. They start from the learned
            initial state anyway, and cost the same for every length of sequence then.
    """

    def __init__(self, blocks: Mapping[Site, SequenceBlock], *, sample: bool = False) -> None:
        self.blocks = dict(blocks)
        self.sample = sample
        self._latest: dict[Site, dict[str, Tensor]] = {}
        self._state_dtypes: dict[Site, set[torch.dtype]] = {}
        self._measured: set[Site] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> HealthMonitor:
        if self._hooks:
            raise RuntimeError("This monitor is measuring already; leave it before entering it again.")
        self._measured.clear()
        for site, block in self.blocks.items():
            # Before any other hook: sharding takes a block's parameters away in one.
            hook = block.register_forward_hook(self._measure(site), with_kwargs=True, prepend=True)
            self._hooks.append(hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _measure(self, site: Site) -> Any:
        def hook(block: SequenceBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if site in self._measured:
                return
            self._measured.add(site)
            x = kwargs["x"] if "x" in kwargs else args[0]
            context = kwargs.get("context") or (args[2] if len(args) > 2 else None) or BlockContext()
            with torch.no_grad():
                self._latest[site] = self._figures(site, x, context, *output)

        return hook

    def _figures(self, site: Site, x: Tensor, context: BlockContext, y: Tensor, after: BlockState) -> dict[str, Tensor]:
        """Of the call that made ``y`` and the state ``after`` it from ``x``, all in the host's layout."""
        block = self.blocks[site]
        adapter = block.info.format
        tokens, context = adapter.to_tokens(x), replace(context, coordinates=adapter.coordinates(x))
        if self.sample:
            tokens, context = _first(tokens, context, sample_length(block))
        measured = dict(block.statistics(tokens, context))
        measured["output_not_finite"] = _share_not_finite([y])
        numbers = [tensor for tensor in after.values() if tensor.is_floating_point()]
        if numbers:
            measured["state_not_finite"] = _share_not_finite(numbers)
            norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in numbers]
            measured["state_norm"] = torch.linalg.vector_norm(torch.stack(norms))
            measured["drift"] = block.drift(after).max()
            self._state_dtypes[site] = {tensor.dtype for tensor in numbers}
        if self.sample and after:
            measured["skipped_updates"] = block.skipped_updates(after).sum()  # of tokens beyond the sample too
        return measured

    def read(self) -> dict[Site, BlockHealth]:
        """The latest figures of every block that was called, with their red flags; one copy from each device."""
        values = _read({(site, name): value for site, found in self._latest.items() for name, value in found.items()})
        self._measured.clear()
        found = {}
        for site, measured in self._latest.items():
            figures = {name: values[site, name] for name in measured}
            found[site] = BlockHealth(figures, self.red_flags(site, figures))
        return found

    def red_flags(self, site: Site, figures: Mapping[str, float]) -> list[str]:
        """The red flags of these figures of the block at ``site``: those of all blocks, and the block's own."""
        return [*self._common_flags(site, figures), *(self.blocks[site].red_flags(figures) if figures else [])]

    def _common_flags(self, site: Site, figures: Mapping[str, float]) -> list[str]:
        flags = []
        for what in ("output", "state"):
            if figures.get(f"{what}_not_finite", 0.0) > 0:
                flags.append(f"{figures[f'{what}_not_finite']:.1%} of its {what} is not finite.")
        skipped = figures.get("skipped_updates", 0.0)
        if skipped > 0 and not figures.get("nonfinite_tokens", 0.0) > 0:  # else the block's own flag says it
            flags.append(f"{skipped:.0f} updates were skipped, because a token was not finite or too large.")
        if not figures.get("drift", 0.0) < LEAST_DRIFT_EXPLODED:
            flags.append(
                f"The fast weights moved {figures['drift']:.3g} times their own size: lower the inner learning rate."
            )
        for dtype in self._state_dtypes.get(site, ()):
            if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
                flags.append(
                    f"The state is {dtype}: updates below {torch.finfo(dtype).eps / 2:.1g} of a weight are lost. "
                    "Use a precision policy whose state is float32."
                )
        return flags


def _first(tokens: Tensor, context: BlockContext, length: int) -> tuple[Tensor, BlockContext]:
    """The first ``length`` of ``tokens [B, T, D]``, and the context of those."""
    embeddings, coordinates = context.input_embeddings, context.coordinates
    return (
        tokens[:, :length],
        replace(
            context,
            input_embeddings=None if embeddings is None else embeddings[:, :length],
            token_mask=None,  # figures are of tokens as they lie in the row
            starts=None,
            segments=None,
            coordinates=None if coordinates is None else coordinates[:length],
        ),
    )


def _share_not_finite(tensors: list[Tensor]) -> Tensor:
    # 0 times a number is 0, and 0 times what is not finite is NaN, which is not 0: two kernels instead of six.
    wrong = torch.stack([torch.count_nonzero(tensor * 0) for tensor in tensors]).sum()
    return wrong / sum(tensor.numel() for tensor in tensors)


def _read(values: Mapping[tuple[Site, str], Tensor]) -> dict[tuple[Site, str], float]:
    """Scalars as numbers: those of one device and dtype are copied together."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Site, str]]] = {}
    for key, value in values.items():
        groups.setdefault((value.device, value.dtype), []).append(key)
    numbers: dict[tuple[Site, str], float] = {}
    for keys in groups.values():
        stacked = torch.stack([values[key].reshape(()) for key in keys])
        numbers |= zip(keys, map(float, stacked.tolist()), strict=True)
    return numbers


def dead_block_flag(block: SequenceBlock) -> list[str]:
    """A red flag when no parameter of the block has a gradient after a backward: it cannot be trained."""
    gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    if any(bool((gradient != 0).any()) for gradient in gradients):
        return []
    frozen = [name for name, parameter in block.named_parameters() if not parameter.requires_grad]
    zero = [name for name, parameter in block.named_parameters() if not bool((parameter != 0).any())]
    why = f" Frozen: {', '.join(frozen)}." if frozen else ""
    why += f" Zero: {', '.join(zero)}." if zero else ""
    return [f"No parameter has a gradient, so the block will never learn.{why}"]
