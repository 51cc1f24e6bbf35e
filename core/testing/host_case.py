"""How the checks run a host: a description that the host's package gives, and a variant in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.injection import Injection, make_plan
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.testing.case import assert_close, assert_equal

LENGTH = 17
"""Tokens of a row."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Streaming against one forward pass through a whole host. In bfloat16 every layer rounds its output (2^-8 relative),
and another number of tokens rounds it differently: the base model itself differs by 3e-2 between the two."""


class HostStream(ABC):
    """A host that streams, all rows in one call."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` for tokens ``[B, ..., T]``: T is 1, or more where the host fills its caches so."""

    def step_masked(self, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """``step``, where tokens at which ``token_mask [B, T]`` is false take no part.

        For hosts that have ``HostCase.masked_logits``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no masked tokens. Leave HostCase.masked_logits out.")

    @abstractmethod
    def reset(self, mask: Tensor) -> None:
        """Reset the rows where ``mask [B]`` is true."""

    @abstractmethod
    def execute(self, mask: Tensor) -> None:
        """From now on a step advances only the rows where ``mask [B]`` is true."""


@dataclass(frozen=True, kw_only=True)
class HostCase:
    """A description of a host, by which the checks run it.

    Attributes:
        name: for test ids.
        host: its adapter.
        model: the base model in a dtype; the same weights at every call.
        tokens: ``(batch, length, seed)`` to input tokens ``[B, ..., T]``.
        logits: ``(model, tokens)`` to logits ``[B, T, V]`` in one forward pass.
        stream: ``(model, batch)`` to a context in which the model streams.
        growing_cache: True where what a row computes depends on how long the host's caches are (they grow, and a row
            that was reset or held has places in them that are masked): rows are compared by tolerance then, and bit
            for bit elsewhere.
        prefills: whether a stream takes several tokens in a step.
        skeleton: the same architecture in a dtype, on the meta device; None where the host has none.
        masked_logits: ``(model, tokens, token_mask [B, T])`` to logits ``[B, T, V]``, where tokens at which the mask is
            false take no part (left padding); None where the host has no such masks.
    """

    name: str
    host: HostModel
    model: Callable[[torch.dtype], nn.Module]
    tokens: Callable[[int, int, int], Tensor]
    logits: Callable[[nn.Module, Tensor], Tensor]
    stream: Callable[[nn.Module, int], AbstractContextManager[HostStream]]
    growing_cache: bool = False
    prefills: bool = True
    skeleton: Callable[[torch.dtype], nn.Module] | None = None
    masked_logits: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class HostVariantCase:
    """One variant with one set of options in one host.

    ``identity`` are options that make the block the identity (a gate of 0), or None when it has none. ``beside`` is an
    entry of another kind of site, ``{"variant": ..., ...}``: a second block in each of the layers, the identity at
    step 0.
    """

    on: HostCase
    variant: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any] | None
    beside: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    registry: Registry = field(default_factory=default_registry, repr=False)

    def __str__(self) -> str:
        variants = self.variant if self.beside is None else f"{self.variant}+{self.beside['variant']}"
        return f"{self.on.name}-{variants}-{str(self.dtype)[6:]}"

    def inject(self, model: nn.Module, options: Mapping[str, Any] | None = None, *, excite: bool = True) -> Injection:
        """Blocks in the last two layers, with disturbed parameters so that every term counts."""
        entry = {"variant": self.variant, "layers": "last:2", **(self.options if options is None else options)}
        entries = [entry] if self.beside is None else [entry, {"layers": "last:2", **self.beside}]
        configs = [parse_block(each, registry=self.registry) for each in entries]
        plan = make_plan(model, self.on.host, configs, policy=FP32_STATE, registry=self.registry)
        injection = plan.apply(model)
        if excite:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in injection.parameters():
                    parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
        return injection

    def injected(self) -> nn.Module:
        model = self.on.model(self.dtype)
        self.inject(model)
        return model

    def streamed(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with self.on.stream(model, tokens.shape[0]) as stream:
            return torch.cat([stream.step(tokens[..., t : t + 1]) for t in range(tokens.shape[-1])], dim=1)

    def assert_same_row(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """Bit-equal, or within the tolerance where the host's caches grow: another length rounds otherwise."""
        if self.on.growing_cache:
            assert_close(actual, expected, TOLERANCE[self.dtype], what)
        else:
            assert_equal(actual, expected, what)
