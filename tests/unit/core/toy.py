"""Toy blocks and a toy host: as small as the contracts of core allow, so that core is tested alone.

Shape legend: B streams, T tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import BlockConfig, FrozenConfig, HostConfig
from moshi_ttt.core.errors import ConfigError, HostError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.host import CarriedState, HostModel
from moshi_ttt.core.precision import FP32, FP32_STATE, UNIFORM, DtypeRoles, PrecisionPolicy
from moshi_ttt.core.registry import Registry
from moshi_ttt.core.state import BlockState

DIM = 8
LAYERS = 4


class Gate(FrozenConfig):
    init: float = 0.05


class ToyConfig(BlockConfig):
    variant: Literal["toy", "toy_mlp"] = "toy"
    rate: float = 0.5
    causal: bool = True
    heads: int = 2
    gate: Gate = Gate()
    fallback: Gate | None = None


class ToyBlock(SequenceBlock):
    """``y_t = x_t + gate * (memory before t)``, ``memory += rate * x_t``; ``memory`` starts at a learned vector."""

    def __init__(self, config: ToyConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        if info.dim % config.heads:
            raise ConfigError(f"heads = {config.heads} does not divide the width {info.dim}.")
        options: dict[str, Any] = {"device": info.device, "dtype": roles.master}
        self.gate = nn.Parameter(torch.empty(info.dim, **options))
        self.initial = nn.Parameter(torch.empty(info.dim, **options))
        self.projection = nn.utils.skip_init(nn.Linear, info.dim, info.dim, bias=False, **options)

    @property
    def causal(self) -> bool:
        return self.config.causal  # type: ignore[attr-defined,no-any-return]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.gate.fill_(self.config.gate.init)  # type: ignore[attr-defined]
        self.initial.copy_(torch.randn(self.info.dim, generator=generator))
        self.projection.weight.copy_(torch.randn(self.info.dim, self.info.dim, generator=generator))

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        memory = self.initial.to(self.roles.state).expand(batch_size, -1)
        return {"memory": memory, "seen": torch.zeros(batch_size, dtype=torch.int64, device=memory.device)}

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        state = state or self.init_state(x.shape[0], x.device)
        wide = self.projection(x.to(self.roles.master)).to(self.roles.state)
        added = self.config.rate * wide.cumsum(1) * float(context.updates)  # type: ignore[attr-defined]
        memory = state["memory"][:, None] + added
        before = torch.cat((state["memory"][:, None], memory[:, :-1]), 1)
        y = (x + self.gate * before).to(x.dtype)
        return y, {"memory": memory[:, -1], "seen": state["seen"] + x.shape[1]}

    def flops_per_token(self) -> int:
        return 2 * self.info.dim * self.info.dim


class NeedsEmbeddings(ToyBlock):
    needs_input_embeddings = True


class ToyMLP(ToyBlock):
    """The feed-forward kind: the host's own MLP plus the gated memory."""

    kind: ClassVar[SiteKind] = SiteKind.FEED_FORWARD

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        y, after = super().compute(x, state, context)
        mlp = self.info.mlp
        assert mlp is not None
        return mlp.linear_out(mlp.activation(mlp.linear_in(x))) + (y - x), after


class ToyLayer(nn.Module):
    def __init__(self, *, with_mlp: bool, **options: Any) -> None:
        super().__init__()
        self.mix = nn.Linear(DIM, DIM, **options)
        self.linear_in = nn.Linear(DIM, 2 * DIM, **options) if with_mlp else None
        self.linear_out = nn.Linear(2 * DIM, DIM, **options) if with_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        blocks = dict(self.named_children())
        if "ttt_sequence" in blocks:
            x, _ = blocks["ttt_sequence"](x)
        if self.linear_in is None or self.linear_out is None:
            return x
        if "ttt_feed_forward" in blocks:
            return x + blocks["ttt_feed_forward"](x)[0]
        return x + self.linear_out(torch.relu(self.linear_in(x)))


class ToyModel(nn.Module):
    """The last layer has no gated MLP, as some hosts' layers have none."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                ToyLayer(with_mlp=index < LAYERS - 1, dtype=dtype, device=device) for index in range(LAYERS)
            )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ToyHostConfig(HostConfig):
    name: Literal["toy"] = "toy"
    width: int = DIM


class ToyHost(HostModel):
    name = "toy"
    causal = True
    config_class = ToyHostConfig

    def load(self, config: Any, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        return ToyModel(dtype=dtype or torch.float32, device=str(device))

    def skeleton(self, config: Any) -> nn.Module:
        return ToyModel(device="meta")

    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        if not isinstance(model, ToyModel):
            raise HostError(f"Expected a ToyModel, got {type(model).__name__}.")
        found = []
        for index, layer in enumerate(model.layers):
            weight = layer.mix.weight
            common: dict[str, Any] = {
                "dim": DIM, "num_heads": 2, "device": weight.device, "dtype": weight.dtype, "format": SequenceFormat(),
            }  # fmt: skip
            found.append(SiteInfo(site=Site(index, SiteKind.SEQUENCE), **common))
            if layer.linear_in is not None:
                mlp = SimpleNamespace(linear_in=layer.linear_in, linear_out=layer.linear_out, activation=torch.relu)
                found.append(SiteInfo(site=Site(index, SiteKind.FEED_FORWARD), mlp=mlp, **common))
        return tuple(found)

    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        for site, block in blocks.items():
            model.layers[site.layer].add_module(f"ttt_{site.kind}", block)  # type: ignore[index,union-attr]

    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        removed = self.blocks(model)
        for site in removed:
            delattr(model.layers[site.layer], f"ttt_{site.kind}")  # type: ignore[index,arg-type]
        return removed

    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        return {
            Site(index, kind): getattr(layer, f"ttt_{kind}")
            for index, layer in enumerate(model.layers)  # type: ignore[arg-type]
            for kind in SiteKind
            if hasattr(layer, f"ttt_{kind}")
        }

    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in model.state_dict().items() if ".ttt_" not in name}

    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        for name, tensor in self.base_state_dict(model).items():
            tensor.copy_(state_dict[name])

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, tensor in self.base_state_dict(model).items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return {"dim": DIM, "layers": LAYERS, "weights": digest.hexdigest()}

    def carry(self, model: nn.Module, state: Any = None, **options: Any) -> AbstractContextManager[CarriedState]:
        raise NotImplementedError("No test of core carries state through a host.")

    def updates(self, model: nn.Module, enabled: Any) -> AbstractContextManager[None]:
        raise NotImplementedError("No test of core switches updates through a host.")

    def fsdp_units(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.layers)  # type: ignore[arg-type]


def toy_registry(**blocks: Any) -> Registry:
    """A registry of toys; ``blocks`` are further variants by name (a factory; their config is ``ToyConfig``)."""
    registry = Registry()
    for policy in (FP32_STATE, UNIFORM, FP32):
        registry.register("precision_policy", policy.name, policy)
    registry.register("format_adapter", "sequence", SequenceFormat())
    registry.register("host", "toy", ToyHost())
    registry.register_block("toy", config=ToyConfig, block=ToyBlock)
    registry.register_block("toy_mlp", config=ToyConfig, block=ToyMLP)
    for name, factory in blocks.items():
        registry.register_block(name, config=AnyNameConfig, block=factory)
    return registry


class AnyNameConfig(ToyConfig):
    variant: str = "toy"  # type: ignore[assignment]


def toy_block(
    *,
    policy: PrecisionPolicy = FP32_STATE,
    dtype: torch.dtype = torch.float32,
    cls: type[ToyBlock] = ToyBlock,
    **options: Any,
) -> ToyBlock:
    """One initialized block on the CPU, outside any host."""
    info = SiteInfo(
        site=Site(1, cls.kind), dim=DIM, num_heads=2, device=torch.device("cpu"), dtype=dtype, format=SequenceFormat()
    )
    block = cls(ToyConfig(**options), info, policy.roles(dtype))
    with torch.no_grad():
        block.reset_parameters(torch.Generator().manual_seed(0))
    return block
