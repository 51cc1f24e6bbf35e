"""Moshi as a case for the conformance kit: any variant can be checked in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from moshi_ttt.core.testing.host_checks import HostCase, HostStream
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import FEW_CODEBOOKS, random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import LMModel


def _tiny_skeleton(dtype: torch.dtype) -> LMModel:
    return random_tiny_lm(dtype=dtype, device="meta", **FEW_CODEBOOKS)


def moshi_case(
    name: str = "moshi",
    model: Callable[[torch.dtype], LMModel] | None = None,
    skeleton: Callable[[torch.dtype], LMModel] | None = None,
) -> HostCase:
    """Moshi's own training and streaming, on ``model`` or a small random one with few codebooks; its tokens are legal.

    ``skeleton`` gives the architecture of ``model`` on the meta device.
    """
    build = model or (lambda dtype: random_tiny_lm(dtype=dtype, **FEW_CODEBOOKS))
    if model is None:
        skeleton = _tiny_skeleton
    sizes = build(torch.float32)

    def tokens(batch: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, sizes.text_card, (batch, 1, length), generator=generator)
        audio = torch.randint(0, sizes.card, (batch, sizes.n_q, length), generator=generator)
        return torch.cat([text, audio], dim=1)

    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        _, text = cast(LMModel, model).forward_text(tokens)
        return text[:, 0]

    return HostCase(
        name=name, host=MOSHI_HOST, model=build, tokens=tokens, logits=logits, stream=_stream, skeleton=skeleton
    )


class _MoshiStream(HostStream):
    def __init__(self, model: LMModel) -> None:
        self.model = model

    def step(self, tokens: Tensor) -> Tensor:
        _, text = self.model.forward_text(tokens)
        return text[:, 0]

    def reset(self, mask: Tensor) -> None:
        self.model.reset_streaming(mask)

    def execute(self, mask: Tensor) -> None:
        self.model.set_exec_mask(mask)


@contextmanager
def _stream(model: nn.Module, batch: int) -> Iterator[HostStream]:
    lm = cast(LMModel, model)
    with lm.streaming(batch):
        yield _MoshiStream(lm)
