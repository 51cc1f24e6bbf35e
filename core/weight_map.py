"""Weights of a block in the layout of another implementation, in and out.

A plugin registers weight maps by the hook ``moshi_ttt_weight_maps``. A map knows names and shapes, not files: give it
the tensors of one layer, with the other implementation's prefix taken off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.errors import WeightMapError
from moshi_ttt.core.sharding import assign


class WeightMap(ABC):
    """One layout of the weights of one kind of block."""

    @abstractmethod
    def names(self, block: SequenceBlock) -> Mapping[str, str]:
        """Every name of the other layout, and the block's parameter that it is. Equal shapes; none twice."""

    @abstractmethod
    def neutral(self, block: SequenceBlock) -> Mapping[str, float | None]:
        """The block's parameters that the other layout lacks, each with the value that stands for its absence.

        None: no value does. Such a parameter is the block's own, kept when weights come in and left out when they go.
        """


def import_weights(block: SequenceBlock, weight_map: WeightMap, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``block`` from ``tensors``, in the block's own dtypes. Strict: all names and shapes, or nothing is written.

    Raises WeightMapError with every name that is missing or unexpected and every shape that differs, or when the map is
    for another kind of block.
    """
    names, own = _checked_names(block, weight_map), dict(block.named_parameters())
    problems = [f"missing {name}" for name in names if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in names]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the block's {mine} {tuple(own[mine].shape)}"
        for name, mine in names.items()
        if name in tensors and tensors[name].shape != own[mine].shape
    ]
    if problems:
        raise WeightMapError(
            f"These are not the weights of the block at {block.info.site} in this layout: {'; '.join(problems)}. "
            "Nothing was written. Give the tensors of one layer, without their prefix."
        )
    for name, mine in names.items():
        assign(own[mine], tensors[name])
    for mine, value in weight_map.neutral(block).items():
        if value is not None:
            assign(own[mine], own[mine].detach().new_full(own[mine].shape, value))


def export_weights(block: SequenceBlock, weight_map: WeightMap) -> dict[str, Tensor]:
    """The block's weights under the other layout's names, detached copies.

    Raises WeightMapError when the block has learned something that the other layout cannot say.
    """
    names = _checked_names(block, weight_map)
    own = {name: parameter.detach() for name, parameter in block.named_parameters()}
    lost = [
        mine
        for mine, value in weight_map.neutral(block).items()
        if value is not None and bool((own[mine] != value).any())
    ]
    if lost:
        raise WeightMapError(
            f"The block at {block.info.site} has values that this layout has no place for: {', '.join(lost)}. "
            "Set them to their neutral values first, if the block can do without them."
        )
    return {name: own[mine].clone() for name, mine in names.items()}


def _checked_names(block: SequenceBlock, weight_map: WeightMap) -> Mapping[str, str]:
    """The map's names for ``block``. Raises WeightMapError unless every parameter of the block is in the map once."""
    names = weight_map.names(block)
    mapped, own = [*names.values(), *weight_map.neutral(block)], {name for name, _ in block.named_parameters()}
    if sorted(mapped) != sorted(own):
        differ = ", ".join(sorted(own.symmetric_difference(mapped))) or "a parameter that it has twice"
        raise WeightMapError(
            f"This weight map is not for the block at {block.info.site}, a {type(block).__name__}: they differ in "
            f"{differ}. Take the map of the block's own variant, and a block without the options that these belong to."
        )
    return names
