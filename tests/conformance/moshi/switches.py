"""The tiny Moshi with two blocks, and the two switches of its streams and calls: ``updates`` and ``volume``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.layers import BlockSite
from tests.unit.hosts.trained import tiny_with_trained

BLOCKS: list[dict[str, Any]] = [
    {"variant": "ttt_linear", "layers": "1", "chunk": 4, "gate": {"init": 0.5}},
    {"variant": "gating_mlp", "layers": "2", "chunk": 4, "lr": 0.3, "train_w_down": True},
]
HOST = {"name": "moshi", "hf_repo": "builtin:tiny", "dtype": "float32"}
FRAMES = 14


@dataclass(frozen=True)
class Switch:
    """``name`` is that of the host's context, of a site's attribute and of a buffer of its stream."""

    name: str
    on: Any
    off: Any
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.name

    def thrown(self, model: Any, value: Any) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = getattr(MOSHI_HOST, self.name)(model, value)
        return context

    def rows(self, *on: bool) -> Tensor:
        """``[B]``: on or off row by row."""
        return torch.tensor(on).to(self.dtype)

    def of_stream(self, site: BlockSite) -> Tensor:
        tensor: Tensor = getattr(site._streaming_state, self.name)
        return tensor

    def is_on(self, model: Any) -> bool:
        """In all streams of all blocks."""
        return all(bool((self.of_stream(site) == self.on).all()) for site in sites(model))

    def is_default(self, model: Any) -> bool:
        """Outside of streams."""
        return all(getattr(site, self.name) == self.on for site in sites(model))


UPDATES = Switch("updates", True, False, torch.bool)
VOLUME = Switch("volume", 1.0, 0.0, torch.float32)


def load(compiled: bool = False, **options: Any) -> Any:
    """The model; ``options`` of both blocks, beside those of ``BLOCKS``."""
    model, injection = tiny_with_trained([{**block, **options} for block in BLOCKS])
    for site, block in injection.blocks.items():
        if compiled and site.kind == "feed_forward":
            block.compile_step()
    return model


def codes(rows: int = 3) -> Tensor:
    """``[B, 17, FRAMES]``."""
    return torch.randint(0, 100, (rows, 17, FRAMES), generator=torch.Generator().manual_seed(0))


def sites(model: Any) -> list[BlockSite]:
    return [module for module in model.modules() if isinstance(module, BlockSite)]


def logits(model: Any) -> Tensor:
    """Text logits of one pass."""
    found: Tensor = model(codes()).text_logits.nan_to_num()
    return found


def heard(model: Any, tokens: Tensor) -> Tensor:
    """Text logits ``[B, 1, T, card]`` of tokens ``[B, 17, T]``, frame by frame, in the stream that runs."""
    return torch.cat([model.forward_text(frame)[1] for frame in tokens.split(1, -1)], dim=2)


@torch.no_grad()
def streamed(
    model: Any, switch: Switch = VOLUME, value: Any = None, *, at: int = 0, rows: int = 3
) -> tuple[Tensor, Sequence[dict[str, Tensor]]]:
    """Text logits ``[B, 1, T, card]`` and the states after them; the switch has this value from frame ``at`` on."""
    tokens = codes(rows)
    with model.streaming(rows):
        before = [heard(model, tokens[..., :at])] if at else []
        addresses = [switch.of_stream(site).data_ptr() for site in sites(model)]
        with switch.thrown(model, switch.on if value is None else value):
            after = heard(model, tokens[..., at:])
            final = [{n: t.clone() for n, t in site._streaming_state.buffers.items()} for site in sites(model)]
        where = [switch.of_stream(site).data_ptr() for site in sites(model)]
        assert where == addresses, "a captured graph would not follow"
        assert switch.is_on(model)
    return torch.cat([*before, after], dim=2), final
