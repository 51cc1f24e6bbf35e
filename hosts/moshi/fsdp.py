"""Moshi's part of sharding: a digest before ``core.sharding.shard``, and a ``forward_text`` that gathers after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from moshi_ttt.core import sharding as sharding_of_any
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.hosts.moshi.base_weights import remember_digest
from moshi_ttt.hosts.moshi.upstream import LMModel


def shard(model: nn.Module, policy_roles: DtypeRoles, mesh: DeviceMesh | None = None) -> nn.Module:
    """The earlier name of ``core.sharding.shard`` for a Moshi."""
    from moshi_ttt.hosts.moshi.host import MOSHI_HOST

    warnings.warn(
        "hosts.moshi.fsdp.shard(model, roles, mesh) is now core.sharding.shard(host, model, roles, mesh).",
        DeprecationWarning,
        stacklevel=2,
    )
    return sharding_of_any.shard(MOSHI_HOST, model, policy_roles, mesh)


@contextmanager
def sharding(model: LMModel) -> Iterator[None]:
    """The context in which ``model`` is sharded: its weights are whole when it begins."""
    remember_digest(model)
    yield
    _gather_for_forward_text(model)


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
