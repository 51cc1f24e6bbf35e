"""A host as another project would write it: rotary attention with a growing cache, left padding, a split gated MLP.

Shape legend: B rows, T tokens of a call, S tokens in the cache, D width, H heads, d = D / H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core.base_weights import load_base_weights, weight_digest
from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.carry import Carry, ForwardContext
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.host import CarriedState, HostModel, updates_switch
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.volume import volume_switch

DIM, HEADS, HIDDEN, VOCABULARY, LAYERS = 32, 4, 48, 50, 4
GATED = (0, 1, 2)
"""Layers whose feed-forward is gated; the last one's is not."""
MODULES = {SiteKind.SEQUENCE: "ttt", SiteKind.FEED_FORWARD: "ttt_mlp"}


class Stream:
    """What all rows have seen: keys and values of each layer, which of them count, positions, states of blocks."""

    def __init__(self, model: LlamaModel, rows: int) -> None:
        self.caches: list[tuple[Tensor, Tensor]] = [(torch.empty(rows, HEADS, 0, DIM // HEADS),) * 2] * LAYERS
        self.valid = torch.zeros(rows, 0, dtype=torch.bool)  # [B, S]
        self.position = torch.zeros(rows, dtype=torch.int64)
        self.exec_mask = torch.ones(rows, dtype=torch.bool)
        blocks = LLAMA_HOST.blocks(model)
        self.states: dict[Site, BlockState] = {site: block.allocate_state(rows) for site, block in blocks.items()}

    def reset(self, model: LlamaModel, mask: Tensor) -> None:
        self.valid = self.valid & ~mask[:, None]
        self.position = self.position.masked_fill(mask, 0)
        for site, block in LLAMA_HOST.blocks(model).items():
            block.reset_state(self.states[site], mask)


class SplitMLP(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(DIM, HIDDEN, bias=False, **options) for _ in range(2))
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False, **options)
        self.act_fn = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, gated: bool, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(DIM, eps=1e-5, **options) for _ in range(2))
        self.qkv, self.out = (nn.Linear(DIM, n * DIM, bias=False, **options) for n in (3, 1))
        self.mlp = SplitMLP(**options) if gated else nn.Sequential(nn.Linear(DIM, DIM, **options), nn.GELU())

    def forward(self, x: Tensor, context: ForwardContext, place: Place, stream: Stream | None) -> Tensor:
        x = x + self._attend(self.norm1(x), place, stream)
        if (block := getattr(self, "ttt", None)) is not None:
            x = run(block, x, context, stream)
        heard = self.norm2(x)
        if (block := getattr(self, "ttt_mlp", None)) is not None:
            return x + run(block, heard, context, stream)
        return x + cast(Tensor, self.mlp(heard))

    def _attend(self, x: Tensor, place: Place, stream: Stream | None) -> Tensor:
        # [B, T, 3 D] -> [B, T, 3, H, d] -> three of [B, H, T, d]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = place.rotate(q), place.rotate(k)
        if stream is not None:
            cache = stream.caches[place.layer]
            k, v = (torch.cat([old.to(new), new], dim=2) for old, new in zip(cache, (k, v), strict=True))
            stream.caches[place.layer] = (k, v)  # [B, H, S, d]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=place.allowed)
        return cast(Tensor, self.out(attended.transpose(1, 2).flatten(2)))  # [B, H, T, d] -> [B, T, D]


class Place:
    """Where the tokens of a call are, and what each may attend to: ``allowed [B, 1, T, S]``."""

    def __init__(self, kept: Tensor, stream: Stream | None) -> None:
        rows, length = kept.shape
        valid = kept if stream is None else torch.cat([stream.valid, kept], dim=1)  # [B, S]
        first = torch.zeros(rows, dtype=torch.int64) if stream is None else stream.position
        position = first[:, None] + kept.long().cumsum(1) - 1  # [B, T]
        if stream is not None:
            stream.valid, stream.position = valid, position[:, -1] + 1
        query = torch.arange(valid.shape[1] - length, valid.shape[1])[:, None]
        key = torch.arange(valid.shape[1])
        self.allowed = (valid[:, None, None] & (key <= query)) | (key == query)  # a masked token sees itself alone
        self.layer = 0
        angle = position[:, None, :, None] / 10_000 ** (torch.arange(0, DIM // HEADS, 2) * HEADS / DIM)
        self.cos, self.sin = angle.cos(), angle.sin()  # [B, 1, T, d / 2]

    def rotate(self, x: Tensor) -> Tensor:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, H, T, d] -> two of [B, H, T, d / 2]
        turned = (even * self.cos - odd * self.sin, even * self.sin + odd * self.cos)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def run(block: SequenceBlock, x: Tensor, context: ForwardContext, stream: Stream | None) -> Tensor:
    if stream is None:
        return context.run(block, x)
    token = BlockContext(
        input_embeddings=context.input_embeddings, updates=context.updates, volume=context.volume,
        exec_mask=stream.exec_mask, token_mask=context.token_mask,
    )  # fmt: skip
    return block.step(x, stream.states[block.info.site], token)


class LlamaModel(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, DIM, **options), nn.Linear(DIM, VOCABULARY, **options)
        self.layers = nn.ModuleList(Layer(index in GATED, **options) for index in range(LAYERS))
        self.carry: Carry | None = None
        self.stream: Stream | None = None
        self.switches: dict[str, Any] = {"updates": True, "volume": 1.0}

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of ``tokens [B, T]``; where ``token_mask [B, T]`` is false a token is padding."""
        x = self.embed(tokens)
        kept = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
        if self.stream is not None:
            kept = kept & self.stream.exec_mask[:, None]
        given = {**self.switches, "token_mask": token_mask}
        context = ForwardContext(x, **given) if self.carry is None else self.carry.begin(x, **given)
        place = Place(kept, self.stream)
        for index, layer in enumerate(self.layers):
            place.layer = index
            x = layer(x, context, place, self.stream)
        if self.carry is not None:
            self.carry.advance(context)
        return cast(Tensor, self.head(x))

    @contextmanager
    def streaming(self, rows: int) -> Iterator[Stream]:
        self.stream = Stream(self, rows)
        try:
            yield self.stream
        finally:
            self.stream = None


class LlamaHost(HostModel):
    name: ClassVar[str] = "toy_llama"
    causal: ClassVar[bool] = True

    def load(self, config: Any, *, device: Any = "cpu", dtype: torch.dtype | None = None) -> LlamaModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaModel().to(device=device, dtype=dtype).eval()

    def skeleton(self, config: Any) -> LlamaModel:
        return LlamaModel(device="meta").eval()

    def sites(self, model: nn.Module) -> tuple[SiteInfo, ...]:
        found = []
        for index, layer in enumerate(checked(model).layers):
            weight = cast(Layer, layer).qkv.weight
            common: dict[str, Any] = {
                "dim": DIM, "num_heads": HEADS, "device": weight.device, "dtype": weight.dtype,
                "format": SequenceFormat(),
            }  # fmt: skip
            found.append(SiteInfo(site=Site(index, SiteKind.SEQUENCE), **common))
            if index in GATED:
                found.append(SiteInfo(site=Site(index, SiteKind.FEED_FORWARD), mlp=layer.mlp, **common))
        return tuple(found)

    def attach(self, model: nn.Module, blocks: Mapping[Site, SequenceBlock]) -> None:
        if checked(model).stream is not None:
            raise HostError("The model is streaming. Attach blocks before the stream starts.")
        for site, block in blocks.items():
            setattr(checked(model).layers[site.layer], MODULES[site.kind], block)

    def detach(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        found = self.blocks(model)
        for site in found:
            delattr(checked(model).layers[site.layer], MODULES[site.kind])
        return found

    def blocks(self, model: nn.Module) -> dict[Site, SequenceBlock]:
        layers = enumerate(checked(model).layers)
        places = [(Site(i, kind), layer, name) for i, layer in layers for kind, name in MODULES.items()]
        return {site: getattr(layer, name) for site, layer, name in places if hasattr(layer, name)}

    def base_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        own = tuple(f"layers.{site.layer}.{MODULES[site.kind]}." for site in self.blocks(model))
        return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}

    def load_base(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        load_base_weights(model, {name: name for name in self.base_state_dict(model)}, state_dict)

    def fingerprint(self, model: nn.Module) -> dict[str, Any]:
        return {"layers": LAYERS, "weights": weight_digest(self.base_state_dict(model))}

    @contextmanager
    def carry(
        self, model: nn.Module, state: CarriedState | None = None, *, document_ids: Tensor | None = None
    ) -> Iterator[CarriedState]:
        opened = checked(model).carry = Carry.open(self.blocks(model), state, document_ids)
        try:
            yield opened.state
        finally:
            checked(model).carry = None

    @contextmanager
    def _switched(self, model: nn.Module, name: str, value: Any) -> Iterator[None]:
        before = checked(model).switches[name]
        checked(model).switches[name] = value
        try:
            yield
        finally:
            checked(model).switches[name] = before

    def updates(self, model: nn.Module, enabled: bool | Tensor) -> Any:
        return self._switched(model, "updates", updates_switch(enabled))

    def volume(self, model: nn.Module, value: float | Tensor) -> Any:
        return self._switched(model, "volume", volume_switch(value, self.blocks(model)))

    def synthetic_loss(self, model: nn.Module, *, batch_size: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCABULARY, (batch_size, length), generator=generator)
        return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())

    def fsdp_units(self, model: nn.Module) -> Sequence[nn.Module]:
        return [*self.blocks(model).values(), *checked(model).layers, model]


def checked(model: nn.Module) -> LlamaModel:
    if not isinstance(model, LlamaModel):
        raise HostError(f"The host 'toy_llama' is for a LlamaModel, got {type(model).__name__}.")
    return model


LLAMA_HOST = LlamaHost()
