"""A toy block for the host's tests, and the few things that all of them do with it.

Its fast weights are one row of D values per stream, W. Token t adds to a running sum; at the end of every chunk the sum
goes into W and starts again. The output is x + gate * (W * mix x). Slow, causal, with an unfinished chunk and a counter
in its state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, Site, SiteKind
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.precision import FP32_STATE, PrecisionPolicy
from moshi_ttt.core.state import BlockState
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm
from moshi_ttt.hosts.moshi.upstream import LMGen


class ToyConfig(BlockConfig):
    variant: str = "toy"
    chunk: int = 4
    causal: bool = True


class ToyBlock(SequenceBlock):
    """See the module's docstring. ``seen`` collects the dtypes of the states it met, for the precision tests."""

    def __init__(self, config, info, roles) -> None:
        super().__init__(config, info, roles)
        place = {"device": info.device, "dtype": roles.master}
        self.initial = nn.Parameter(torch.empty(info.dim, **place))
        self.mix = nn.Parameter(torch.empty(info.dim, info.dim, **place))
        self.gate = nn.Parameter(torch.empty(info.dim, **place))
        self.seen: set[torch.dtype] = set()
        self.calls = 0

    @property
    def causal(self) -> bool:
        return self.config.causal

    def reset_parameters(self, generator=None) -> None:
        self.initial.normal_(0.5, 0.5, generator=generator)
        self.mix.normal_(0.0, self.info.dim**-0.5, generator=generator)
        self.gate.normal_(0.3, 0.1, generator=generator)

    def init_state(self, batch_size, device=None) -> BlockState:
        weights = self.initial.to(self.roles.state).expand(batch_size, -1)
        position = torch.zeros(batch_size, dtype=torch.int64, device=weights.device)
        return {"weights": weights, "pending": torch.zeros_like(weights), "position": position}

    def target(self, x: Tensor, context: BlockContext) -> Tensor:
        return x

    def compute(self, x, state, context):
        state = state or self.init_state(x.shape[0], x.device)
        self.calls += 1
        self.seen |= {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        weights, pending, position = state["weights"], state["pending"], state["position"]
        mixed = x.to(self.roles.compute) @ self.mix.to(self.roles.compute)
        target = torch.tanh(self.target(x, context).to(weights.dtype))
        outputs = []
        for t in range(x.shape[1]):
            outputs.append(weights * mixed[:, t])
            if context.updates is not False:
                mask = context.updates_mask(x)
                count = 1 if mask is None else mask.long()
                pending, position = pending + context.where_updated(target[:, t]), position + count
                full = (position == self.config.chunk)[:, None]
                weights = torch.where(full, 0.9 * weights + 0.1 * pending, weights)
                pending = torch.where(full, 0, pending)
                position = position % self.config.chunk
        y = (x + self.gate * torch.stack(outputs, 1)).to(x.dtype)
        return y, {"weights": weights, "pending": pending, "position": position}

    def flops_per_token(self) -> int:
        return 2 * self.info.dim**2


class EmbeddingToyBlock(ToyBlock):
    """The same, learning from the input embeddings."""

    needs_input_embeddings = True

    def target(self, x, context):
        return context.input_embeddings * 4


class NonCausalToyConfig(ToyConfig):
    causal: bool = False


def make_blocks(
    model: nn.Module,
    layers=(0, 2),
    *,
    block=ToyBlock,
    config: ToyConfig | None = None,
    policy: PrecisionPolicy = FP32_STATE,
    seed: int = 0,
) -> dict[Site, SequenceBlock]:
    """Initialized toy blocks for the sequence sites of ``layers``, not attached."""
    infos = {info.site: info for info in MOSHI_HOST.sites(model)}
    blocks = {}
    for layer in layers:
        info = infos[Site(layer, SiteKind.SEQUENCE)]
        made = block(config or ToyConfig(), info, policy.roles(info.dtype))
        if info.device.type != "meta":
            with torch.no_grad():
                made.reset_parameters(torch.Generator().manual_seed(seed * 100 + layer))
        blocks[info.site] = made
    return blocks


def toy_lm(layers=(0, 2), *, block=ToyBlock, policy: PrecisionPolicy = FP32_STATE, **options):
    """A random tiny Moshi with toy blocks attached."""
    model = random_tiny_lm(**options)
    MOSHI_HOST.attach(model, make_blocks(model, layers, block=block, policy=policy))
    return model


def random_codes(model: nn.Module, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids ``[B, n_q + 1, T]``: text first, then audio."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(model.text_card, (batch, 1, length), generator=generator)
    audio = torch.randint(model.card, (batch, model.n_q, length), generator=generator)
    return torch.cat([text, audio], dim=1)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max(1, max |b|)"""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


@torch.no_grad()
def stream(model: nn.Module, codes: Tensor) -> Tensor:
    """Text logits ``[B, 1, T, card]`` token by token; the model must be streaming."""
    return torch.cat([model.forward_text(codes[..., t : t + 1])[1] for t in range(codes.shape[-1])], dim=2)


def generator_of(model, **options) -> LMGen:
    return LMGen(model, use_sampling=False, support_out_of_sync=True, **options)


def user_codes(model, batch: int, steps: int, seed: int = 1) -> Tensor:
    """``[B, 8, T]``: what the microphone hears."""
    return torch.randint(model.card, (batch, 8, steps), generator=torch.Generator().manual_seed(seed))


def run(lm_gen: LMGen, codes: Tensor, masks=None) -> list[Tensor]:
    """The tokens of each step. ``masks``: step -> exec_mask ``[B]``."""
    out = []
    for t in range(codes.shape[-1]):
        if masks is not None:
            lm_gen.set_exec_mask(masks[t])
        out.append(lm_gen.step(codes[..., t : t + 1]))
    return out


def buffers(lm_gen_or_model, layer=0) -> dict[str, Tensor]:
    model = getattr(lm_gen_or_model, "lm_model", lm_gen_or_model)
    return model.transformer.layers[layer].ttt._streaming_state.buffers
