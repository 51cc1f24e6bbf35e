"""The contract of a host: a model that blocks are injected into.

A host adapter is stateless; every method takes the model. It lists the model's sites, attaches and detaches blocks
without renaming a base parameter, hands blocks their context, ties their state into the model's own streaming, and
says which modules are units of sharding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moshi_ttt.core import state as states
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo
from moshi_ttt.core.config import HostConfig
from moshi_ttt.core.deprecation import renamed
from moshi_ttt.core.errors import ConfigError, ContextError, HostError
from moshi_ttt.core.losses import HostLosses
from moshi_ttt.core.state import BlockState


@dataclass
class CarriedState:
    """The state of all blocks of a model between two segments of the same streams (carried training).

    Attributes:
        blocks: one state per site; always detached: gradients stop at a segment's edge.
        document_ids: ``[B]`` int64, the document each row was in; a row whose id changes is reset.
    """

    blocks: dict[Site, BlockState] = field(default_factory=dict)
    document_ids: Tensor | None = None

    def detach(self) -> CarriedState:
        return CarriedState({site: states.detach(state) for site, state in self.blocks.items()}, self.document_ids)


def updates_switch(enabled: bool | Tensor) -> bool | Tensor:
    """``enabled``, checked, for ``HostModel.updates``; a tensor is copied, because the caller may change it.

    Raises ContextError for anything but a bool or ``[B]`` bool.
    """
    if isinstance(enabled, bool):
        return enabled
    if not isinstance(enabled, Tensor):
        raise ContextError(f"updates: expected a bool, or [B] bool with one answer a row, got {enabled!r}.")
    if enabled.dtype != torch.bool or enabled.dim() != 1:
        raise ContextError(
            f"updates: expected a bool, or [B] bool with one answer a row, got shape {tuple(enabled.shape)} and "
            f"dtype {enabled.dtype}."
        )
    return enabled.detach().clone()


class HostModel(ABC):
    """The integration of one family of models. Registered by name; stateless."""

    name: ClassVar[str]
    causal: ClassVar[bool]
    format_name: ClassVar[str] = "sequence"
    """The registered format adapter that turns this host's activations into tokens."""
    config_class: ClassVar[type[HostConfig]] = HostConfig

    @abstractmethod
    def load(self, config: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """The base model named by ``config`` (an instance of ``config_class``), in eval mode.

        ``dtype=None`` is the dtype it is stored in. Raises HostError with what is missing.
        """

    def config_for(self, name: str) -> HostConfig:
        """The configuration of the model called ``name``, for ``moshi_ttt.load_model``: a repository, a folder, ...

        Nothing is read: ``load`` finds out whether there is such a model. Raises HostError, as it does by default for
        a host that loads no model by name.
        """
        raise HostError(
            f"The host {self.name!r} loads no model by name, and was given {name!r}. Give load_model a "
            f"{self.config_class.__name__} instead."
        )

    def recognizes(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family: whether ``sites`` accepts it."""
        try:
            self.sites(model)
        except HostError:
            return False
        return True

    @abstractmethod
    def skeleton(self, config: Any) -> nn.Module:
        """The architecture named by ``config`` on the meta device; no weights are read. Raises HostError."""

    def entries_of_mapping(self, mapping: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], str]:
        """The entries that a ``ttt`` mapping stands for, in a config that was written for earlier code of this host.

        Override it in a host that has such code.

        Args:
            mapping: the value of ``ttt``, which should be a list of entries.
            where: what error messages call the source.

        Returns:
            The entries, not yet validated, and the message of a warning that shows them.

        Raises:
            ConfigError: this host reads no such mapping, or not this one.
        """
        raise ConfigError(
            f"{where}: 'ttt' must be a list of entries, each with a variant, got {dict(mapping)!r}. The host "
            f"{self.name!r} has no earlier form of it."
        )

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        """Every site of the model, in layer order. Raises HostError when the model is not of this family."""

    @abstractmethod
    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        """Insert the blocks. Renames no base parameter. Either all are inserted, or none and the error is raised."""

    @abstractmethod
    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        """Take all blocks out again and return them; the model is then bit-identical to the base."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        """The blocks that are attached, by site, in layer order."""

    @abstractmethod
    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's own parameters and buffers, without the blocks', under the names the base model uses."""

    @abstractmethod
    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Load base weights into a model with or without blocks; strict over the base's keys.

        ``core.base_weights.load_base_weights`` does it, for a model on the meta device and a sharded one too.
        """

    @abstractmethod
    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        """JSON-able facts that decide whether an adapter belongs to this model: shapes, and a digest of the weights
        (``core.base_weights.weight_digest``).
        """

    def earlier_fingerprints(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """What earlier versions of this host returned as ``fingerprint``: adapters that have one of them load too."""
        return ()

    def extra_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters that are neither the base's nor a block's, by name: a LoRA's factors. Adapters hold them."""
        return {}

    def describe_extra(self, model: nn.Module) -> dict[str, Any]:
        """JSON-able facts from which ``add_extra`` makes the same extra parameters; empty where there are none."""
        return {}

    def add_extra(self, model: nn.Module, description: Mapping[str, Any]) -> None:
        """Give a model without extra parameters those of ``description``, before any block. Raises HostError."""
        raise HostError(f"The host {self.name!r} has no extra parameters to add to its models, and got {description}.")

    def remove_extra(self, model: nn.Module) -> None:
        """Undo ``add_extra``: the model is bit-identical to the base."""
        raise HostError(f"The host {self.name!r} has no extra parameters to remove.")

    @abstractmethod
    def carry(
        self,
        model: nn.Module,
        state: CarriedState | None = None,
        *,
        document_ids: Tensor | None = None,
    ) -> AbstractContextManager[CarriedState]:
        """Forward passes inside this context continue from ``state`` and store their own in the returned object.

        Functional: ``state`` itself is not changed. ``document_ids [B]`` that differ from the state's reset the row.
        ``core.carry`` has what a host needs for it.
        """

    @abstractmethod
    def updates(self, model: nn.Module, enabled: bool | Tensor) -> AbstractContextManager[None]:
        """Inside this context test-time updates are enabled or disabled: in forward passes, in training and in streams.

        ``enabled`` is one answer for all rows, or ``[B]`` bool, one for each; it reaches every block by its context. A
        row whose updates are disabled learns nothing and forgets nothing (a block's ``decay``), and other rows are not
        affected. Contexts nest: the innermost one counts, and the outer one again after it, also after an error. A
        stream that was captured in a graph follows the switch, and so does one that starts inside.

        Raises ContextError for anything but a bool or ``[B]`` bool (``updates_switch`` says so), and where ``enabled``
        does not have a row for each row of a running stream. With guidance an
        LMGen streams two rows for each voice, b and B + b.
        """

    def volume(self, model: nn.Module, value: float | Tensor) -> AbstractContextManager[None]:
        """Inside this context what blocks add to the base model is multiplied by ``value``: in calls and in streams.

        ``value`` is a number from 0 to 10 (``core.config.LARGEST_VOLUME``) for all rows, or ``[B]`` floating point, one
        for each; it multiplies each block's ``output_scale``. At 0 the model is the base model bit for bit, row by row,
        at 1 the trained model. Updates are made at every volume, from the outputs of lower blocks at that volume.
        Contexts nest and streams follow as with ``updates``.

        Raises ContextError for anything else (``volume_switch`` says so, and reads a tensor's values), where ``value``
        does not have a row for each row of a running stream, and where a block does not declare ``scales_output`` and
        ``value`` is not the number 1. Raises HostError in a host without a volume, as one is that does not override it.
        """
        raise HostError(f"The host {self.name!r} has no volume. Implement HostModel.volume, beside updates.")

    def frozen(self, model: nn.Module) -> AbstractContextManager[None]:
        """Declare that no parameter of a block changes while a stream runs that starts inside this context.

        Such a stream casts each parameter once on every device, and a graph captured in it reads the copies. Without
        this a graph casts them at every replay, because it runs no Python that could see a change; on a CPU a stream
        sees changes by itself. A change raises PrecisionError, at the next step that is not replayed or when the stream
        ends. A host that keeps no copies need not do anything here.
        """
        return nullcontext()

    def synthetic_loss(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> Tensor:
        """A differentiable training loss on synthetic input that depends on the seed alone, for health checks.

        Raises HostError where a host cannot make synthetic input.
        """
        earlier = type(self).probe
        if earlier is not HostModel.probe:  # a host written for the earlier name
            renamed("probe", "synthetic_loss", of=type(self))
            return earlier(self, model, batch_size=batch_size, length=length, seed=seed)
        raise self._no_synthetic_input()

    def probe(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> Tensor:
        """The earlier name of ``synthetic_loss``."""
        if type(self).synthetic_loss is HostModel.synthetic_loss:
            raise self._no_synthetic_input()
        renamed("probe", "synthetic_loss", of=type(self))
        return self.synthetic_loss(model, batch_size=batch_size, length=length, seed=seed)

    def _no_synthetic_input(self) -> HostError:
        return HostError(f"The host {self.name!r} cannot make synthetic input, so it cannot be checked.")

    def losses(self, **options: float) -> HostLosses:
        """What training minimizes and evaluation reports. ``options`` are the host's own, each with a default.

        Raises HostError where the host has no losses, or an option is not one of its own.
        """
        raise HostError(f"The host {self.name!r} has no losses, so it cannot be trained. Implement HostModel.losses.")

    @abstractmethod
    def fsdp_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules to shard, innermost first: each block on its own, and last the model itself."""

    def stored_units(self, model: nn.Module) -> Sequence[nn.Module]:
        """Those of ``fsdp_units`` whose parameters are gathered in the dtype they are stored in: the blocks."""
        return tuple(self.blocks(model).values())

    def sharding(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which ``core.sharding.shard`` makes the units; for what a host does before and after it."""
        return nullcontext()
