"""Whole tensors and their parts: writing to, reading from and making tensors that are sharded over ranks (DTensor)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def assign(parameter: Tensor, value: Tensor) -> None:
    """Write a whole ``value`` into a parameter or buffer, sharded or not; every rank calls this with the same value."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            value = value.to(device=parameter.device, dtype=parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or all of a sharded one: a collective, which every rank of its mesh takes part in."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or this rank's part of a sharded one, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(sharded: Tensor, local: Tensor) -> Tensor:
    """This rank's part ``local`` as a tensor sharded like ``sharded``: its mesh, placements, shape and strides.

    No communication; differentiable. ``local`` must have the shape of this rank's part of ``sharded``. A tensor that is
    not sharded gives ``local`` itself. Raises ValueError for another shape.
    """
    if not isinstance(sharded, DTensor):
        part, made = sharded, local
    else:
        part = sharded.to_local()
        made = DTensor.from_local(
            local,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
    if local.shape != part.shape:
        raise ValueError(f"This rank's part has shape {tuple(part.shape)}, got a tensor of shape {tuple(local.shape)}.")
    return made
