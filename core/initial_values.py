"""Initial values of blocks: drawn from the seed and the site alone, or given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moshi_ttt.core.block import SequenceBlock, Site, SiteKind
from moshi_ttt.core.errors import InjectionError
from moshi_ttt.core.sharding import assign


def initialize_blocks(blocks: dict[Site, SequenceBlock], seed: int) -> None:
    """Initial values, drawn on the CPU from the seed and the site alone: equal on every device, rank and plan."""
    for site, block in blocks.items():
        with torch.no_grad():
            block.reset_parameters(_generator(seed, site))


def _generator(seed: int, site: Site) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + site.layer) * 2 + (site.kind != SiteKind.SEQUENCE))


def reset_unsaved(blocks: Mapping[Site, SequenceBlock], seed: int) -> None:
    """Initial values of what adapters and checkpoints do not store: buffers that are not persistent."""
    for site, block in blocks.items():
        with torch.no_grad():
            block.reset_unsaved(_generator(seed, site))


def fill_blocks(blocks: Mapping[Site, SequenceBlock], seed: int, values: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer its value. Raises InjectionError unless ``values`` are exactly those needed."""
    own: dict[str, Tensor] = {}
    for site, block in blocks.items():
        own |= {f"{site}.{name}": tensor for name, tensor in block.named_parameters()}
        own |= {f"{site}.{name}": tensor for name, tensor in block.persistent_buffers().items()}
    if apart := sorted(own.keys() ^ values.keys()):
        raise InjectionError(
            f"Nothing was injected: the values are not those of the blocks; on one side only: {', '.join(apart[:8])}."
        )
    if meta := [name for name, tensor in own.items() if tensor.is_meta]:
        raise InjectionError(
            f"Nothing was injected: {meta[0]} is on the meta device and cannot hold a value. Load the model's weights "
            "first."
        )
    problems = [
        f"{name} is {list(values[name].shape)} {values[name].dtype}, and {list(tensor.shape)} {tensor.dtype} is needed"
        for name, tensor in own.items()
        if (values[name].shape, values[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        raise InjectionError(f"Nothing was injected: {'; '.join(problems[:8])}.")
    reset_unsaved(blocks, seed)
    for name, tensor in own.items():
        assign(tensor, values[name])
