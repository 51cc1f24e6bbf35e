"""The volume, a factor on what a block adds to the base model: 0 is the base model bit for bit, 1 the trained one.

A block's own is ``output_scale`` in its config, which adapters hold; at run time ``HostModel.volume`` sets another, for
all rows or row by row, and the two multiply. A variant uses it by one line, ``SequenceBlock.at_volume``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moshi_ttt.core.config import LARGEST_VOLUME
from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.state import row_mask

if TYPE_CHECKING:
    from moshi_ttt.core.block import SequenceBlock, Site


def at_volume(base: Tensor, added: Tensor, volume: float | Tensor, dtype: torch.dtype) -> Tensor:
    """``base + volume * added``, computed in ``dtype``, in the dtype of ``base``.

    Bit for bit ``base`` where the volume is 0, whatever ``added`` is (it may not be finite, and -0 + 0 is not -0), and
    ``base + added`` where it is 1. A number of 1 costs nothing.

    Args:
        base: ``[B, T, D]``: the residual of a sequence block, the host's own MLP of a feed-forward block.
        added: ``[B, T, D]``, any floating dtype.
        volume: a number, or ``[B]``, floating point, one for each row; no gradient reaches it.
        dtype: that of the role ``output``.
    """
    if not isinstance(volume, Tensor):
        if volume == 1:
            if base.dtype == added.dtype == dtype:
                return base + added
            return (base.to(dtype) + added.to(dtype)).to(base.dtype)
        volume = base.new_full((1,), volume, dtype=dtype)
    factor = row_mask(volume.to(dtype), base)  # [B or 1, 1, 1]
    return torch.where(factor == 0, base, (base.to(dtype) + factor * added.to(dtype)).to(base.dtype))


def combined(volume: float | Tensor, scale: float, dtype: torch.dtype) -> float | Tensor:
    """``volume`` times the number ``scale``, both as ``dtype`` holds them; of rows ``[B]``, in ``dtype``.

    So a number and a tensor of it give ``at_volume`` the same factor, bit for bit.
    """
    if scale == 1:
        return volume
    scale = _held(scale, dtype)
    return volume.to(dtype) * scale if isinstance(volume, Tensor) else _held(volume, dtype) * scale


def _held(number: float, dtype: torch.dtype) -> float:
    """``number`` rounded to ``dtype``, half to even. By Python alone: no mode of tensors is asked."""
    info = torch.finfo(dtype)
    step = max(math.ldexp(info.eps, math.frexp(number)[1] - 1), info.smallest_normal * info.eps)  # a power of 2
    return round(number / step) * step


def volume_switch(value: float | Tensor, blocks: Mapping[Site, SequenceBlock]) -> float | Tensor:
    """``value``, checked, for ``HostModel.volume`` of ``blocks``; a tensor is copied: the caller may change it.

    Raises ContextError for anything but a number from 0 to ``LARGEST_VOLUME``, or ``[B]`` of them in a floating dtype,
    and as ``require_volume``. A tensor's values are read here, once.
    """
    if not isinstance(value, Tensor):
        if problem := number_problem(value):
            raise ContextError(f"volume: {problem}")
        if value != 1:
            require_volume(blocks)
        return float(value)
    if not value.is_floating_point() or value.dim() != 1:
        raise ContextError(
            f"volume: expected a number, or [B] floating point with one a row, got shape {tuple(value.shape)} and "
            f"dtype {value.dtype}."
        )
    rows = value.detach().clone()
    for row, number in enumerate([] if rows.is_meta else rows.tolist()):
        if problem := number_problem(number):
            raise ContextError(f"volume: row {row}: {problem}")
    require_volume(blocks)
    return rows


def require_volume(blocks: Mapping[Site, SequenceBlock]) -> None:
    """ContextError where a block does not declare that it follows the volume."""
    if deaf := [f"{site} ({type(block).__name__})" for site, block in blocks.items() if not block.scales_output]:
        raise ContextError(f"A volume other than 1 {no_volume(', '.join(deaf))}")


def no_volume(blocks: str) -> str:
    """The end of a sentence about blocks that do not follow the volume, and what to do."""
    return (
        f"would have no effect on {blocks}: the block does not declare scales_output. Leave it out, or have the block "
        "return self.at_volume(base, added, context) and declare scales_output = True."
    )


def number_problem(value: object) -> str:
    """What is wrong with a volume that is a number, in a sentence; empty where nothing is."""
    # typeshed's Real has no order.
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= LARGEST_VOLUME:  # type: ignore[operator]
        return ""
    return (
        f"got {value!r}. Give a number from 0 (the base model) to {LARGEST_VOLUME:g}; at 1 a block adds what it adds "
        "in training."
    )
