"""Autocast is off inside a block: it would round what the precision policy keeps in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from moshi_ttt.core.errors import PrecisionError
from moshi_ttt.core.site import SiteKind

if TYPE_CHECKING:
    from moshi_ttt.core.block import SequenceBlock

Method = TypeVar("Method", bound=Callable[..., Any])


def is_on(tensor: Tensor) -> bool:
    """Whether an autocast is on for the device of ``tensor``; it is of no effect on the meta device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(block: SequenceBlock, tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which no autocast is on for the device of ``tensor``.

    Raises PrecisionError where that changes what the host itself computes inside the block: its gated MLP.
    """
    if not is_on(tensor):
        return nullcontext()
    device, site, roles = tensor.device.type, block.info.site, block.roles
    rounded = torch.get_autocast_dtype(device)
    if block.kind is SiteKind.FEED_FORWARD and rounded is not roles.param:
        raise PrecisionError(
            f"The block at {site} computes the host's own MLP, under an autocast to {rounded} that would round it "
            f"otherwise than policy {roles.policy!r}, which asks for {roles.param} in the role 'param'. Leave the "
            f"autocast, or load the host in {rounded}: the policy decides what is rounded."
        )
    return torch.autocast(device, enabled=False)


def unrounded(method: Method) -> Method:
    """Wrap a method of a block, whose first argument is a tensor or a state: it runs without autocast."""
    if getattr(method, "unrounded", False):
        return method

    @wraps(method)
    def wrapped(self: SequenceBlock, *given: Any, **named: Any) -> Any:
        first = next(iter((*given, *named.values())))
        with without_autocast(self, first if isinstance(first, Tensor) else next(iter(first.values()))):
            return method(self, *given, **named)

    wrapped.unrounded = True  # type: ignore[attr-defined]  # a mark: a method is wrapped once
    return cast(Method, wrapped)
