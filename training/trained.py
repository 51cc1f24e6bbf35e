"""A model with blocks, and its trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import FSDPModule

from moshi_ttt.core.host import HostModel
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.losses import HostLosses
from moshi_ttt.core.precision import DtypeRoles

Group = Literal["ttt", "gates", "lora", "base"]
GROUPS: tuple[Group, ...] = ("ttt", "gates", "lora", "base")


@dataclass(frozen=True)
class TrainedModel:
    """A host's model with its trained parameters: those that require gradients.

    Attributes:
        model: the model, sharded (``core.sharding.shard``) or not.
        injection: its blocks; of none where there are none.
        roles: the precision policy, resolved for the dtype in which the base computes.
        losses: what is minimized.
        notes: warnings about the adapter that the values come from.
    """

    model: Any
    injection: Injection
    roles: DtypeRoles
    losses: HostLosses
    notes: tuple[str, ...] = ()

    @property
    def host(self) -> HostModel:
        return self.injection.host

    def groups(self) -> dict[Group, dict[str, nn.Parameter]]:
        """Every trained parameter by its name in the model, in the group whose learning rate it has."""
        gates = {id(gate) for block in self.injection.blocks.values() for gate in block.gate_parameters()}
        blocks = {id(parameter) for parameter in self.injection.parameters()} - gates
        factors = {id(parameter) for parameter in self.host.extra_parameters(self.model).values()}

        def group_of(identity: int) -> Group:
            if identity in gates:
                return "gates"
            return "ttt" if identity in blocks else "lora" if identity in factors else "base"

        found: dict[Group, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found[group_of(id(parameter))][name] = parameter
        return {group: members for group, members in found.items() if members}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in the model."""
        return {name: parameter for members in self.groups().values() for name, parameter in members.items()}

    def units(self) -> Iterator[FSDPModule]:
        """The units of sharding; none where the model is not sharded."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                yield module

    def exchange_gradients(self, enabled: bool) -> None:
        """Whether the next backward pass exchanges gradients between ranks, in every unit of sharding."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(enabled)

    def reshard(self) -> None:
        """Free whole parameters: the root unit stays gathered after a forward pass that no backward pass follows."""
        for unit in self.units():
            unit.reshard()
