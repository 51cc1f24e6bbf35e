"""Tensor layouts: conversion between a host's activations and tokens, and between tokens and chunks.

Shape legend: B streams, T tokens, D width, H heads, Dh = D / H, N chunks, C tokens a chunk.

A host names the format adapter its activations need; a block sees ``[B, T, D]`` tokens and asks for chunks. The tail
of the last chunk is padded with zeros and masked, so padding never reaches a state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class ChunkLayout:
    """How T tokens lie in N chunks of C.

    Without ``offset`` every row starts at a chunk boundary and ``N = ceil(T / C)``. With ``offset [B]`` (int64, each in
    ``0..C-1``) row b continues a chunk of which it has already seen ``offset[b]`` tokens; N is then the same for every
    row, ``ceil((T + C - 1) / C)``, so that no value is read on the host.
    """

    def __init__(
        self, length: int, chunk_size: int, *, offset: Tensor | None = None, device: torch.device | None = None
    ):
        if length < 1 or chunk_size < 1:
            raise ValueError(
                f"A chunk layout needs at least one token and one per chunk, got {length} and {chunk_size}."
            )
        self.length = length
        self.chunk_size = chunk_size
        self.offset = offset
        lead = 0 if offset is None else chunk_size - 1
        self.num_chunks = -(-(length + lead) // chunk_size)
        self.slots = self.num_chunks * chunk_size
        slot = torch.arange(self.slots, device=device if offset is None else offset.device)
        source = slot[None] if offset is None else slot[None] - offset[:, None]
        valid = (source >= 0) & (source < length)
        self._source = source.clamp(0, length - 1)
        self.valid = valid.view(-1, self.num_chunks, chunk_size)
        """``[B or 1, N, C]`` bool: slots that hold one of the T tokens."""

    @property
    def full(self) -> bool:
        """True when the layout has no padding at all (known without reading a tensor)."""
        return self.offset is None and self.slots == self.length

    def split(self, x: Tensor, num_heads: int | None = None) -> Tensor:
        """``[B, T, D] -> [B, H, N, C, D/H]``, or ``[B, N, C, D]`` without ``num_heads``. Padding is zero."""
        batch, length, width = x.shape
        if length != self.length:
            raise ValueError(f"This layout is for {self.length} tokens, got {length}.")
        if self.offset is not None:
            index = self._source[..., None].expand(batch, -1, width)
            x = torch.where(self.valid.view(-1, self.slots, 1), x.gather(1, index), 0)
        elif self.slots > length:
            x = torch.nn.functional.pad(x, (0, 0, 0, self.slots - length))
        x = x.reshape(batch, self.num_chunks, self.chunk_size, width)
        if num_heads is None:
            return x
        return x.view(*x.shape[:3], num_heads, -1).permute(0, 3, 1, 2, 4)

    def merge(self, chunks: Tensor) -> Tensor:
        """The inverse of ``split``: ``[B, H, N, C, Dh]`` or ``[B, N, C, D]`` to ``[B, T, D]``, padding dropped."""
        if chunks.dim() == 5:
            chunks = chunks.permute(0, 2, 3, 1, 4).flatten(-2)
        tokens = chunks.flatten(1, 2)
        if self.offset is None:
            return tokens[:, : self.length]
        slot = self.offset[:, None] + torch.arange(self.length, device=tokens.device)
        return tokens.gather(1, slot[..., None].expand(-1, -1, tokens.shape[-1]))


class FormatAdapter(ABC):
    """Converts between a host's activations and the tokens ``[B, T, D]`` that blocks compute on."""

    axes: ClassVar[int] = 1
    """How many numbers say where a token is: 1 in a sequence."""

    @abstractmethod
    def to_tokens(self, activations: Tensor) -> Tensor:
        """Host activations to tokens ``[B, T, D]``, without a copy where a view will do."""

    @abstractmethod
    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens ``[B, T, D]`` back to the layout of the activations ``like``."""

    def coordinates(self, activations: Tensor) -> Tensor | None:
        """``[T, axes]`` int64, the place of each token; None in a sequence, where the position in the chunk is used.

        A token that has no place is at the origin: RoPE turns it by nothing.
        """
        return None

    def prefix(self, activations: Tensor) -> int:
        """Number of leading tokens that a reversed pass does not reverse, such as a text before a video."""
        return 0

    def chunks(self, tokens: Tensor, chunk_size: int, offset: Tensor | None = None) -> ChunkLayout:
        """The chunk layout of ``tokens [B, T, D]``; ``offset [B]`` continues unfinished chunks."""
        return ChunkLayout(tokens.shape[1], chunk_size, offset=offset, device=tokens.device)


class GridFormat(FormatAdapter):
    """Activations on a grid over time ``[B, T, H, W, D]`` (video): tokens in the order time, row, column."""

    axes: ClassVar[int] = 3

    def to_tokens(self, activations: Tensor) -> Tensor:
        if activations.dim() != 5:
            raise ValueError(f"Expected activations [B, T, H, W, D], got shape {tuple(activations.shape)}.")
        return activations.flatten(1, 3)

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens.reshape(*like.shape[:-1], tokens.shape[-1])

    def coordinates(self, activations: Tensor) -> Tensor:
        axes = [torch.arange(size, device=activations.device) for size in activations.shape[1:4]]
        return torch.cartesian_prod(*axes)


class PrefixedGridFormat(FormatAdapter):
    """Tokens that have no place, then those of a grid: ``[B, P + T H W, D]``, a text of P tokens before a video.

    A host makes one for the length of its prefix and its grid's height and width; T follows from the activations.
    """

    axes: ClassVar[int] = 3

    def __init__(self, prefix: int, height: int, width: int) -> None:
        if prefix < 0 or height < 1 or width < 1:
            raise ValueError(
                f"A prefix of {prefix} tokens before a grid of {height} by {width}: give a prefix of 0 or more, and 1 "
                "or more for each side."
            )
        self._prefix, self._height, self._width = prefix, height, width

    def to_tokens(self, activations: Tensor) -> Tensor:
        frame = self._height * self._width
        length = activations.shape[1] - self._prefix if activations.dim() == 3 else 0
        if length < 1 or length % frame:
            raise ValueError(
                f"Expected activations [B, {self._prefix} + T * {frame}, D] with T of 1 or more, got shape "
                f"{tuple(activations.shape)}."
            )
        return activations

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens

    def coordinates(self, activations: Tensor) -> Tensor:
        frames = (activations.shape[1] - self._prefix) // (self._height * self._width)
        sizes = (frames, self._height, self._width)
        grid = torch.cartesian_prod(*(torch.arange(size, device=activations.device) for size in sizes))
        return torch.cat([grid.new_zeros(self._prefix, self.axes), grid])

    def prefix(self, activations: Tensor) -> int:
        return self._prefix


class SequenceFormat(FormatAdapter):
    """Activations that already are tokens ``[B, T, D]``: language models."""

    def to_tokens(self, activations: Tensor) -> Tensor:
        if activations.dim() != 3:
            raise ValueError(f"Expected activations [B, T, D], got shape {tuple(activations.shape)}.")
        return activations

    def from_tokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens
