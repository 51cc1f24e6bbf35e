"""Sharding a Moshi with blocks by FSDP2.

Units: each block on its own, gathered in the dtype it is stored in, so that fast weights start in float32; then each
layer, gathered in the policy's ``param`` dtype; then the rest. No unit casts its inputs: the default would round a
float32 state on its way in.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fully_shard as fsdp_internals

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.hosts.moshi.base_weights import remember_digest
from moshi_ttt.hosts.moshi.host import MOSHI_HOST, require_lm
from moshi_ttt.hosts.moshi.upstream import LMModel


class _ABCFirst(abc.ABC, FSDPModule):
    """FSDPModule with the memory layout of classes that name ``abc.ABC`` before ``nn.Module``, as Moshi's do."""


def shard(model: nn.Module, policy_roles: DtypeRoles, mesh: DeviceMesh | None = None) -> nn.Module:
    """Shard ``model`` in place over ``mesh`` (all ranks when None) and return it.

    Attach the blocks first; forward passes, ``forward_text`` included, then gather what they need. A model on the meta
    device is sharded there; materialise it afterwards.

    Args:
        model: Moshi's language model, with its blocks attached.
        policy_roles: the precision policy, resolved for this model; its ``param`` and ``reduce`` roles are used here.
        mesh: a device mesh of one dimension, or two to replicate over the first.

    Raises:
        HostError: not a Moshi, already sharded, or no process group.
        ConfigError: a block's parameter has no dimension.
        PrecisionError: a block's parameter is not in the master dtype.
    """
    model = require_lm(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise HostError("This model is sharded already.")
    if mesh is None:
        if not torch.distributed.is_initialized():
            raise HostError("Sharding needs a process group: start with torchrun and call init_process_group first.")
        device = model.device.type
        if device == "meta":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    blocks = list(MOSHI_HOST.blocks(model).values())
    for block in blocks:
        if block.roles != policy_roles:
            raise HostError(
                f"The block at {block.info.site} follows policy {block.roles.policy!r} in a {block.roles.model} model, "
                f"and shard was given {policy_roles.policy!r} for {policy_roles.model}. Give the plan's own roles."
            )
        block.check_shardable()
    remember_digest(model)
    keep = {id(block) for block in blocks} | {id(model.condition_provider)}
    for unit in MOSHI_HOST.fsdp_units(model):
        policy = MixedPrecisionPolicy(
            param_dtype=None if id(unit) in keep else policy_roles.param,
            reduce_dtype=policy_roles.reduce,
            cast_forward_inputs=False,
        )
        _register(type(unit))
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    _gather_for_forward_text(model)
    for block in blocks:
        block.check_precision("sharded")
    return model


def _gather_for_forward_text(model: LMModel) -> None:
    """Make a direct call of ``forward_text`` gather the root's parameters, as a call of the model does.

    ``forward`` calls ``forward_text`` itself. FSDP2's hooks do not nest: the outer call would free the parameters that
    backward needs. So inside ``forward`` the method is the plain one.
    """
    whole, plain = model.forward, model.forward_text
    register_fsdp_forward_method(model, "forward_text")
    hooked = model.forward_text

    def forward(*args: Any, **kwargs: Any) -> Any:
        model.forward_text = plain  # type: ignore[method-assign]
        try:
            return whole(*args, **kwargs)
        finally:
            model.forward_text = hooked  # type: ignore[method-assign]

    model.forward = forward  # type: ignore[method-assign]


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
