"""Health of blocks while they train: what each measures, collected on the device, read when somebody asks.

A block says what to measure (``SequenceBlock.statistics``) and what of it is a red flag (``red_flags``). A monitor runs
the measurements after each call of a block; nothing is read on the host until ``read``.
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


@dataclass
class BlockHealth:
    """One block's figures, and what is wrong with it: a sentence for each red flag, none when it is healthy."""

    figures: dict[str, float] = field(default_factory=dict)
    red_flags: list[str] = field(default_factory=list)


class HealthMonitor:
    """Measures every block it is given, each time the block is called, inside ``with monitor:``.

    Only training's calls are measured (plain and carried), not streaming steps. Under activation checkpointing a layer
    that is run again in backward is measured again.
    """

    def __init__(self, blocks: Mapping[Site, SequenceBlock]) -> None:
        self.blocks = dict(blocks)
        self._latest: dict[Site, dict[str, Tensor]] = {}
        self._state_dtypes: dict[Site, set[torch.dtype]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> HealthMonitor:
        if self._hooks:
            raise RuntimeError("This monitor is measuring already; leave it before entering it again.")
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
        @torch.no_grad()
        def hook(block: SequenceBlock, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = kwargs["x"] if "x" in kwargs else args[0]
            context = kwargs.get("context") or (args[2] if len(args) > 2 else None) or BlockContext()
            y, after = output
            adapter = block.info.format
            context = replace(context, coordinates=adapter.coordinates(x))
            measured = dict(block.statistics(adapter.to_tokens(x), context))
            measured["output_not_finite"] = _share_not_finite([y])
            numbers = [tensor for tensor in after.values() if tensor.is_floating_point()]
            if numbers:
                measured["state_not_finite"] = _share_not_finite(numbers)
                measured["state_norm"] = torch.stack([tensor.double().norm() for tensor in numbers]).norm()
                measured["drift"] = _largest_drift(block, after)
                self._state_dtypes[site] = {tensor.dtype for tensor in numbers}
            self._latest[site] = measured

        return hook

    def read(self) -> dict[Site, BlockHealth]:
        """The latest figures of every block that was called, read from the device, with their red flags."""
        found = {}
        for site, measured in self._latest.items():
            figures = {name: float(value) for name, value in measured.items()}
            found[site] = BlockHealth(figures, self.red_flags(site, figures))
        return found

    def red_flags(self, site: Site, figures: Mapping[str, float]) -> list[str]:
        """What is wrong with these figures of the block at ``site``: what every block shares, and its own."""
        return [*self._common_flags(site, figures), *(self.blocks[site].red_flags(figures) if figures else [])]

    def _common_flags(self, site: Site, figures: Mapping[str, float]) -> list[str]:
        flags = []
        for what in ("output", "state"):
            if figures.get(f"{what}_not_finite", 0.0) > 0:
                flags.append(f"{figures[f'{what}_not_finite']:.1%} of its {what} is not finite.")
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


def _share_not_finite(tensors: list[Tensor]) -> Tensor:
    wrong = torch.stack([(~tensor.isfinite()).sum() for tensor in tensors]).sum()
    return wrong / sum(tensor.numel() for tensor in tensors)


def _largest_drift(block: SequenceBlock, state: BlockState) -> Tensor:
    return block.drift(state).max()


def dead_block_flag(block: SequenceBlock) -> list[str]:
    """A red flag when no parameter of the block has a gradient after a backward: it would never learn anything."""
    gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    if any(bool((gradient != 0).any()) for gradient in gradients):
        return []
    frozen = [name for name, parameter in block.named_parameters() if not parameter.requires_grad]
    zero = [name for name, parameter in block.named_parameters() if not bool((parameter != 0).any())]
    why = f" Frozen: {', '.join(frozen)}." if frozen else ""
    why += f" Zero: {', '.join(zero)}." if zero else ""
    return [f"No parameter has a gradient, so the block will never learn.{why}"]
