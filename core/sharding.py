"""Sharding a host's model by FSDP2, and whole tensors and their parts (DTensor).

Units: each block on its own, gathered in the dtype it is stored in, so that fast weights start in float32; then the
host's own units, gathered in the policy's ``param`` dtype. No unit casts its inputs: the default would round a float32
state on its way in.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp_internals
from torch.distributed.tensor import DTensor, distribute_tensor

from moshi_ttt.core.errors import HostError

if TYPE_CHECKING:
    from moshi_ttt.core.host import HostModel
    from moshi_ttt.core.precision import DtypeRoles

ModelT = TypeVar("ModelT", bound=nn.Module)


def shard(host: HostModel, model: ModelT, roles: DtypeRoles, mesh: DeviceMesh | None = None) -> ModelT:
    """Shard ``model`` in place over ``mesh`` (all ranks when None) and return it.

    Attach the blocks first; forward passes then gather what they need. A model on the meta device is sharded there;
    materialize it afterwards.

    Args:
        host: of the model.
        model: with its blocks attached.
        roles: the precision policy, resolved for this model; its ``param`` and ``reduce`` roles are used here.
        mesh: a device mesh of one dimension, or two to replicate over the first.

    Raises:
        HostError: not a model of the host, already sharded, no process group, or blocks of another policy.
        ConfigError: a block's parameter has no dimension.
        PrecisionError: a block's parameter is not in the master dtype.
    """
    blocks = list(host.blocks(model).values())
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise HostError("This model is sharded already.")
    mesh = mesh or _all_ranks(model)
    for block in blocks:
        if block.roles != roles:
            raise HostError(
                f"The block at {block.info.site} follows policy {block.roles.policy!r} in a {block.roles.model} model, "
                f"and shard was given {roles.policy!r} for {roles.model}. Give the plan's own roles."
            )
        block.check_shardable()
    as_stored = {id(unit) for unit in host.stored_units(model)}
    with host.sharding(model):
        for unit in host.fsdp_units(model):
            policy = MixedPrecisionPolicy(
                param_dtype=None if id(unit) in as_stored else roles.param,
                reduce_dtype=roles.reduce,
                cast_forward_inputs=False,
            )
            _register(type(unit))
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    for block in blocks:
        block.check_precision("sharded")
    return model


def _all_ranks(model: nn.Module) -> DeviceMesh:
    if not torch.distributed.is_initialized():
        raise HostError("Sharding needs a process group: start with torchrun and call init_process_group first.")
    device = next(model.parameters()).device.type
    if device == "meta":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (torch.distributed.get_world_size(),))


class _ABCFirst(abc.ABC, FSDPModule):
    """FSDPModule with the memory layout of classes that name ``abc.ABC`` before ``nn.Module``, as Moshi's do."""


def _register(cls: type[nn.Module]) -> None:
    """Tell FSDP2 which class to turn ``cls`` into, where its own choice has another memory layout.

    ``fully_shard`` changes a module's class to one with the bases ``(FSDPModule, cls)``. Python refuses that for a
    class that derives from ``abc.ABC`` before ``nn.Module``: there the layout starts with ABC's. FSDP2 keeps the
    classes it has made in a private table; a class with the right layout is put there before it looks.
    """
    order = cls.__mro__
    abc_first = abc.ABC in order and order.index(abc.ABC) < order.index(nn.Module)
    if abc_first and cls not in fsdp_internals.cls_to_fsdp_cls:
        made = type(f"FSDP{cls.__name__}", (_ABCFirst, cls), {"__deepcopy__": fsdp_internals._unimplemented_deepcopy})
        fsdp_internals.cls_to_fsdp_cls[cls] = made


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
