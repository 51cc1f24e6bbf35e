"""How kept memories are written: bit for bit, or smaller and with a measured error.

``difference`` writes how far the fast weights are from the learned start, in bfloat16: what a short conversation has
changed is small, so the rounding of the difference is too. ``bfloat16`` rounds the fast weights themselves. Both halve
a float32 memory. What is not floating point, and what is narrower already, is written as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.hosts.moshi.row_state import RowState

Precision = Literal["exact", "difference", "bfloat16"]
DIFFERENCE, ROUNDED = "difference:", "rounded:"
"""What begins the name of a tensor that was written in another form; the dtype that it had follows."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def pack(state: RowState, precision: Precision, start: RowState | None = None) -> tuple[RowState, float]:
    """``state`` as it is written, and its error: the norm of what is lost over the norm of what the memory holds.

    A session is always exact: it continues bit for bit. ``start``: the learned start, for ``difference``.
    Raises HostError where it is missing.
    """
    if precision == "exact" or state.kind == "session":
        return state, 0.0
    if precision == "difference" and start is None:
        raise HostError("The precision 'difference' needs the learned start of the memory.")
    packed: dict[str, Tensor] = {}
    for name, tensor in state.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            packed[name] = tensor
        elif precision == "bfloat16":
            packed[f"{ROUNDED}{dtype}:{name}"] = tensor.bfloat16()
        else:
            assert start is not None
            first = start.tensors.get(name, torch.zeros_like(tensor))
            packed[f"{DIFFERENCE}{dtype}:{name}"] = (tensor - first).bfloat16()
    result = replace(state, tensors=packed)
    return result, _error(state, unpack(result, start))


def unpack(state: RowState, start: RowState | None = None) -> RowState:
    """What ``pack`` was given, up to its error. Raises HostError where a difference is of a start that is missing."""
    tensors: dict[str, Tensor] = {}
    for written, tensor in state.tensors.items():
        form = next((form for form in (DIFFERENCE, ROUNDED) if written.startswith(form)), None)
        if form is None:
            tensors[written] = tensor
            continue
        dtype, _, name = written.removeprefix(form).partition(":")
        if dtype not in _DTYPES:
            raise HostError(f"This memory holds {written!r}, a form that this version does not read.")
        if tensor.dtype != torch.bfloat16 or name in tensors or name in state.tensors:
            raise HostError(
                f"This memory is damaged: {written!r} is {tensor.dtype}, or is there twice. Give another one."
            )
        value = tensor.to(_DTYPES[dtype])
        if form == DIFFERENCE:
            if start is None:
                raise HostError("This memory is a difference from the learned start, which this store was not given.")
            first = start.tensors.get(name, value)
            if first.shape != value.shape:
                raise HostError(
                    f"This memory is damaged: {written!r} is {tuple(value.shape)}, and {tuple(first.shape)} is needed. "
                    "Give the memory of a row of the same model, adapter and options."
                )
            value = value + (first if name in start.tensors else 0)
        tensors[name] = value
    return replace(state, tensors=tensors)


def _error(before: RowState, after: RowState) -> float:
    lost = held = 0.0
    for name, tensor in before.tensors.items():
        if tensor.is_floating_point():
            lost += float((tensor.double() - after.tensors[name].double()).square().sum())
            held += float(tensor.double().square().sum())
    return (lost / held) ** 0.5 if held else 0.0
