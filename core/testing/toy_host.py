"""The kit's own host: residual layers with a gated MLP each, where blocks are planned, injected and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moshi_ttt.core.base_weights import load_base_weights, weight_digest
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.carry import Carry, ForwardContext
from moshi_ttt.core.config import HostConfig
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.host import CarriedState, HostModel, updates_switch
from moshi_ttt.core.losses import HostLosses
from moshi_ttt.core.registry import Registry
from moshi_ttt.core.volume import volume_switch

FRAME_RATE = 12.5
"""What the toy host says its tokens a second are."""


class ToyLayer(nn.Module):
    """``x + mlp(x)`` with a gated MLP; a sequence block comes before it, a feed-forward block in its place."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.mlp = ToyMLP(dim, dtype, device)


class ToyMLP(nn.Module):
    """A gated MLP with weights that depend on its width alone."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.linear_in = nn.utils.skip_init(nn.Linear, dim, 4 * dim, **options)
        self.linear_out = nn.utils.skip_init(nn.Linear, 2 * dim, dim, **options)
        self.activation = nn.functional.silu
        if torch.device(device).type != "meta":
            generator = torch.Generator().manual_seed(dim)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return cast(Tensor, self.linear_out(self.activation(gate) * up))


class ToyModel(nn.Module):
    """A stack of toy layers over ``[B, T, D]``; its input embeddings are its input."""

    def __init__(
        self, dim: int, num_heads: int, *, num_layers: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.layers = nn.ModuleList(ToyLayer(dim, dtype, device) for _ in range(num_layers))
        self.carry: Carry | None = None
        self.updates: bool | Tensor = True
        self.volume: float | Tensor = 1.0

    def forward(self, x: Tensor, token_mask: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
        """``x [B, T, D]`` to ``[B, T, D]``; ``token_mask`` and ``starts``, ``[B, T]`` bool, as in ``BlockContext``."""
        given: dict[str, Any] = {
            "updates": self.updates, "volume": self.volume, "token_mask": token_mask, "starts": starts,
        }  # fmt: skip
        context = ForwardContext(x, **given) if self.carry is None else self.carry.begin(x, **given)
        for layer in self.layers:
            if (block := getattr(layer, SiteKind.SEQUENCE, None)) is not None:
                x = context.run(block, x)
            if (block := getattr(layer, SiteKind.FEED_FORWARD, None)) is not None:
                x = x + context.run(block, x)
            else:
                x = x + cast(ToyLayer, layer).mlp(x)
        if self.carry is not None:
            self.carry.advance(context)
        return x


class ToyLosses(HostLosses):
    """One loss, ``next``: squared error of the output at t as a prediction of the input at t + 1.

    ``inputs`` are ``[B, T, D]``; a term is a position, its mean over D, and weighs 1.
    """

    names: ClassVar[tuple[str, ...]] = ("next",)
    in_nats: ClassVar[bool] = False

    def weights(self, model: ToyModel, inputs: Tensor) -> Tensor:
        return torch.full((2, 1), inputs.shape[0] * (inputs.shape[1] - 1), dtype=torch.float64)

    def sums(self, model: ToyModel, inputs: Tensor) -> Tensor:
        total = self._terms(model, inputs).sum()
        return torch.stack([total, total.detach()]).view(2, 1)

    @torch.no_grad()
    def by_position(self, model: ToyModel, inputs: Tensor) -> dict[str, Tensor]:
        terms = self._terms(model, inputs).double().cpu()
        return {"next": nn.functional.pad(terms, (0, 1), value=torch.nan)}  # [B, T - 1] -> [B, T]

    def _terms(self, model: ToyModel, inputs: Tensor) -> Tensor:
        """``[B, T - 1]``: the mean over D of squared errors."""
        errors: Tensor = model(inputs)[:, :-1] - inputs[:, 1:]
        return errors.float().square().mean(-1)


class ToyHost(HostModel):
    """The host of ``ToyModel``: a sequence site and a feed-forward site in every layer."""

    name = "toy"
    causal = True

    def __init__(self, *, causal: bool = True) -> None:
        self.causal = causal  # type: ignore[misc]  # a class variable of other hosts; this one is of both kinds

    def load(
        self, config: HostConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ToyModel:
        return ToyModel(16, 2, num_layers=4, dtype=dtype or torch.float32, device=device)

    def skeleton(self, config: HostConfig) -> ToyModel:
        return self.load(config, device="meta")

    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        model = self._checked(model)
        found = []
        for index, layer in enumerate(model.layers):
            mlp = cast(ToyLayer, layer).mlp
            weight = mlp.linear_in.weight
            for kind in SiteKind:
                found.append(
                    SiteInfo(
                        site=Site(index, kind),
                        dim=model.dim,
                        num_heads=model.num_heads,
                        device=weight.device,
                        dtype=weight.dtype,
                        format=SequenceFormat(),
                        mlp=mlp if kind is SiteKind.FEED_FORWARD else None,
                        frame_rate=FRAME_RATE,
                    )
                )
        return tuple(found)

    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        for site, block in blocks.items():
            setattr(self._checked(model).layers[site.layer], site.kind, block)

    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        found = self.blocks(model)
        for site in found:
            delattr(self._checked(model).layers[site.layer], site.kind)
        return found

    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        layers = enumerate(self._checked(model).layers)
        sites = [(Site(index, kind), layer) for index, layer in layers for kind in SiteKind if hasattr(layer, kind)]
        return {site: cast(SequenceBlock, getattr(layer, site.kind)) for site, layer in sites}

    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = {
            f"layers.{i}.mlp.linear_{part}.weight"
            for i in range(len(self._checked(model).layers))
            for part in ("in", "out")
        }
        return {name: tensor for name, tensor in model.state_dict().items() if name in own}

    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        load_base_weights(model, {name: name for name in self.base_state_dict(model)}, state_dict)

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        model = self._checked(model)
        weights = weight_digest(self.base_state_dict(model))
        return {"dim": model.dim, "num_layers": len(model.layers), "weights": weights}

    @contextmanager
    def carry(
        self,
        model: nn.Module,
        state: CarriedState | None = None,
        *,
        document_ids: Tensor | None = None,
    ) -> Iterator[CarriedState]:
        model = self._checked(model)
        model.carry = Carry.open(self.blocks(model), state, document_ids)
        try:
            yield model.carry.state
        finally:
            model.carry = None

    @contextmanager
    def updates(self, model: nn.Module, enabled: bool | Tensor) -> Iterator[None]:
        model = self._checked(model)
        before, model.updates = model.updates, updates_switch(enabled)
        try:
            yield
        finally:
            model.updates = before

    @contextmanager
    def volume(self, model: nn.Module, value: float | Tensor) -> Iterator[None]:
        model = self._checked(model)
        before, model.volume = model.volume, volume_switch(value, self.blocks(model))
        try:
            yield
        finally:
            model.volume = before

    def synthetic_loss(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> torch.Tensor:
        x = torch.randn(batch_size, length, self._checked(model).dim, generator=torch.Generator().manual_seed(seed))
        weight = cast(ToyLayer, self._checked(model).layers[0]).mlp.linear_in.weight
        return cast(Tensor, model(x.to(weight.dtype)).float().square().mean())

    def losses(self, **options: float) -> ToyLosses:
        if options:
            raise HostError(f"The toy host's loss has no options, got {', '.join(sorted(options))}.")
        return ToyLosses()

    def fsdp_units(self, model: nn.Module) -> Sequence[nn.Module]:
        return [*self.blocks(model).values(), self._checked(model)]  # its layers are not called as modules

    def _checked(self, model: nn.Module) -> ToyModel:
        if not isinstance(model, ToyModel):
            raise HostError(f"The toy host is for a ToyModel, got {type(model).__name__}.")
        return model


TOY_HOST = ToyHost()


def toy_registry(base: Registry, *, causal: bool = True) -> Registry:
    """The names of ``base`` and the toy host."""
    registry = base.copy()
    registry.register("host", "toy", TOY_HOST if causal else ToyHost(causal=False))
    return registry
