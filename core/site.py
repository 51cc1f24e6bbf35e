"""Sites: the places of blocks in a host, and the description of a site that its block gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from moshi_ttt.core.config import Length
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.format import FormatAdapter
from moshi_ttt.core.gated_mlp import GatedMLP


class SiteKind(str, Enum):
    """Where in a layer a block sits."""

    SEQUENCE = "sequence"
    """After attention (and cross-attention, where there is one), before the feed-forward."""
    FEED_FORWARD = "feed_forward"
    """The gated MLP itself."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, order=True)
class Site:
    """One place in a host: a layer index and a kind."""

    layer: int
    kind: SiteKind

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of ``str``. Raises ValueError on anything else."""
        head, layer, kind = text.split(".")
        if head != "layers":
            raise ValueError(f"Not a site: {text!r}.")
        return cls(int(layer), SiteKind(kind))


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """The description of a site from which its block is built.

    Attributes:
        mlp: the host's gated MLP at a feed-forward site, fused or split (``core.gated_mlp``).
        frame_rate: tokens a second, where the host's tokens have a fixed duration.
        mlp_output: ``(mlp, x) -> y``: the output ``[B, T, D]`` of the MLP by the host's own call, where the host does
            not compute it operation by operation (it may be compiled, and round otherwise); None where it does.
    """

    site: Site
    dim: int
    num_heads: int
    device: torch.device
    dtype: torch.dtype
    format: FormatAdapter
    mlp: GatedMLP | None = None
    frame_rate: float | None = None
    mlp_output: Callable[[GatedMLP, Tensor], Tensor | None] | None = None

    def tokens(self, length: Length) -> int:
        """``length`` in tokens; seconds are rounded to the nearest whole token, and to one at least.

        Raises ConfigError for seconds at a host whose tokens have no fixed duration.
        """
        if isinstance(length, int):
            return length
        if self.frame_rate is None:
            raise ConfigError(
                f"{self.site}: a length of {length!r} is in seconds, and the tokens of this host have no fixed "
                "duration. Give a number of tokens."
            )
        return max(1, round(float(length.removesuffix("s")) * self.frame_rate))

    def on(self, device: torch.device) -> SiteInfo:
        """The same site, with blocks built on another device (the plan builds on ``meta``)."""
        return replace(self, device=device)
