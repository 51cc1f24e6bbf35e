"""The blocks, models and batches that the sections work on: equal values on every device.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moshi_ttt import default_registry, inject, parse_config
from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.injection import Injection
from moshi_ttt.data.dataset import CodesBatch
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm

CHUNK = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "ttt_linear": {"variant": "ttt_linear", "chunk": CHUNK},
    "ttt_mlp": {"variant": "ttt_mlp", "chunk": CHUNK},
    "ttt_multilayer": {"variant": "ttt_multilayer", "chunk": CHUNK, "depth": 3},
    "ttt_ridge": {"variant": "ttt_ridge", "chunk": CHUNK, "heads": 2},
    "ttt_ridge decaying": {
        "variant": "ttt_ridge", "chunk": CHUNK, "heads": 2, "features": "relu2", "key_width": 48, "novelty": True,
        "decay": 0.1, "variance_gate": True,
    },
    "gating_mlp": {"variant": "gating_mlp", "chunk": CHUNK, "lr": 0.3},
    "gating_mlp clipped": {"variant": "gating_mlp", "chunk": CHUNK, "lr": 0.3, "clip": 0.5, "decay": 0.01},
    "gating_mlp causal": {
        "variant": "gating_mlp", "chunk": CHUNK, "target": "hidden_states", "learned_lr": True, "padding": "causal",
    },
    "gating_mlp gradient": {
        "variant": "gating_mlp", "chunk": CHUNK, "update": "gradient", "keys": "unit", "decay": 0.1,
    },
    "gating_mlp ridge": {
        "variant": "gating_mlp", "chunk": CHUNK, "update": "ridge", "lr": 1.0, "learned_lr": True, "keys": "unit",
        "target_norm": True, "start": "next_frame", "success_gate": True,
    },
    "ttt_mlp momentum": {
        "variant": "ttt_mlp", "chunk": CHUNK, "momentum": 0.5, "inner_steps": 2, "conv_kernel": 3, "value": "embedding",
    },
}  # fmt: skip
"""Every variant, some of them with several sets of options."""


class GatedMLP(nn.Module):
    """A host's gated MLP, for feed-forward blocks."""

    def __init__(self, dim: int, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.linear_out = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)
        self.activation = functional.silu
        for parameter in self.parameters():
            parameter.requires_grad_(False)


def block_of(
    entry: Mapping[str, Any], device: torch.device, dtype: torch.dtype, *, dim: int = 64, heads: int = 2,
    hidden: int = 96, policy: str = "fp32_state",
) -> SequenceBlock:  # fmt: skip
    """One block with values away from its initial zeros and ones, drawn on the CPU: equal on every device."""
    registry = default_registry()
    variant = registry.block(entry["variant"])
    kind = getattr(variant.factory, "kind", SequenceBlock.kind)
    mlp = GatedMLP(dim, hidden, device, dtype)
    info = SiteInfo(
        site=Site(0, kind), dim=dim, num_heads=heads, device=device, dtype=dtype, format=SequenceFormat(), mlp=mlp,
        frame_rate=12.5,
    )  # fmt: skip
    roles = registry.policy(policy).roles(dtype)
    block = variant.factory(parse_block({"layers": "0", **entry}, registry=registry), info, roles)
    generator = torch.Generator().manual_seed(0)
    block.reset_parameters(generator)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
        for parameter in mlp.parameters():  # values that bfloat16 holds, so that the host is the same in every dtype
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.copy_(drawn.bfloat16())
    return block


def activations(batch: int, length: int, dim: int, count: int, seed: int = 0) -> list[Tensor]:
    """``count`` tensors ``[B, T, D]`` of values that bfloat16 holds, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, dim, generator=generator).bfloat16().double() for _ in range(count)]


def tiny_model(
    entry: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype, *, moved: float = 0.1, **sizes: Any
) -> tuple[Any, Injection | None]:
    """A random tiny Moshi, with blocks in two of its layers whose parameters are ``moved`` from their start.

    ``sizes`` are those of ``random_tiny_lm``.
    """
    model = random_tiny_lm(device=device, dtype=dtype, **sizes)
    if entry is None:
        return model, None
    config = parse_config(
        {"host": {"name": "moshi", "hf_repo": "builtin:tiny"}, "ttt": [{**entry, "layers": "1,2"}]},
        registry=default_registry(),
    )
    injection = inject(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_((moved * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model, injection


def batches(model: Any, count: int, frames: int, rows: int = 2) -> list[CodesBatch]:
    """Made-up training batches, codes ``[rows, 1 + Q, frames]``."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        text = torch.randint(0, model.text_card, (rows, 1, frames), generator=generator)
        audio = torch.randint(0, model.card, (rows, model.n_q, frames), generator=generator)
        made.append(CodesBatch(torch.cat([text, audio], 1), torch.arange(rows), ()))
    return made
