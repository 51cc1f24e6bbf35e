"""Several adapters of one base model in turn: each is read once, taken out, and put in again while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moshi_ttt.core.adapter import load_adapter
from moshi_ttt.core.block import SequenceBlock, Site
from moshi_ttt.core.errors import InjectionError
from moshi_ttt.core.injection import Injection
from moshi_ttt.core.registry import Registry
from moshi_ttt.core.sharding import assign


@dataclass
class HeldAdapter:
    """An adapter beside its base model, in memory: its file may be gone when it is put in.

    Attributes:
        injection: where it goes; its blocks are there only inside ``inserted``.
        parameters: how many it has, LoRA included.
    """

    injection: Injection
    parameters: int
    _blocks: Mapping[Site, SequenceBlock]
    _extra: Mapping[str, Any]
    _values: Mapping[str, Tensor]
    _inside: bool = False

    @classmethod
    def load(cls, model: nn.Module, folder: Path, registry: Registry | None = None) -> HeldAdapter:
        """The adapter in ``folder``, once it has been in ``model``, which is the base again afterwards, bit for bit.

        Raises AdapterError; the model is then the base as well.
        """
        injection = load_adapter(model, folder, registry=registry)
        host = injection.host
        try:
            extra = host.extra_parameters(model)
            values = {name: parameter.detach() for name, parameter in extra.items()}
            parameters = sum(each.numel() for each in (*injection.parameters(), *values.values()))
            return cls(injection, parameters, injection.blocks, host.describe_extra(model), values)
        finally:
            _take_out(injection)

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """The adapter in its model, also in a context inside; afterwards the model is the base, bit for bit.

        Raises InjectionError where another adapter is in the model.
        """
        if self._inside:
            yield
            return
        host, model = self.injection.host, self.injection.model
        if host.blocks(model) or host.describe_extra(model):
            raise InjectionError(
                "Another adapter is in this model. Leave its context first: one is evaluated at a time."
            )
        try:
            if self._extra:
                host.add_extra(model, self._extra)
                for name, parameter in host.extra_parameters(model).items():
                    assign(parameter, self._values[name])
            host.attach(model, self._blocks)
            self._inside = True
            yield
        finally:
            self._inside = False
            _take_out(self.injection)


def _take_out(injection: Injection) -> None:
    host, model = injection.host, injection.model
    host.detach(model)
    if host.describe_extra(model):
        host.remove_extra(model)
