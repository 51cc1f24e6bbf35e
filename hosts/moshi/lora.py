"""Moshi's own LoRA: adding it, its first values, and merging it into the weights.

y = W x + s B A x with A ``[r, in]`` and B ``[out, r]`` (Hu et al. 2021, https://arxiv.org/abs/2106.09685); B starts at
zero, so the model is the base at first.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.deprecation import moved_names
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.sharding import assign, whole
from moshi_ttt.hosts.moshi.base_weights import base_names
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.upstream import LMModel, LoRALinear, replace_all_linear_with_lora

__getattr__ = moved_names(__name__, __name__, {"initialise_lora": "initialize_lora"})


def add_lora(model: LMModel, *, rank: int, scaling: float) -> None:
    """Put LoRA on every linear layer, in place: ``rank`` r and ``scaling`` s. Do it before attaching blocks.

    The factors have the dtype and device of the layer they are on, and are zero: ``initialize_lora`` gives them their
    first values. Raises HostError where there is a LoRA already, or a block.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise HostError("The model has a LoRA already.")
    if any(isinstance(module, BlockSite) for module in model.modules()):
        raise HostError("LoRA must be added before the blocks; otherwise the blocks get a LoRA too. Detach them first.")
    # On meta, because Moshi's layer draws values for its factors, and for a frozen matrix that is replaced at once.
    replace_all_linear_with_lora(model, rank, scaling, device=torch.device("meta"))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            for factor in (module.lora_A, module.lora_B):
                factor.to_empty(device=module.frozen_W.weight.device)
                torch.nn.init.zeros_(factor.weight)


def remove_lora(model: LMModel) -> None:
    """Put the linear layers that LoRA was put on back in its place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.frozen_W)


def describe_lora(model: LMModel) -> dict[str, Any]:
    """``{"rank": r, "scaling": s}``, or nothing where there is no LoRA. Raises HostError when layers differ."""
    found = {(module.rank, module.scaling) for module in model.modules() if isinstance(module, LoRALinear)}
    if len(found) > 1:
        raise HostError(f"The layers of the model have different LoRAs: {sorted(found)} as (rank, scaling).")
    return {"rank": found.copy().pop()[0], "scaling": found.pop()[1]} if found else {}


def initialize_lora(model: LMModel, seed: int) -> None:
    """A uniform within 1/sqrt(in), B zero; drawn on the CPU from the seed and the layer's name, equal on every rank."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            key = hashlib.sha256(f"{seed} {path}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            a, b = module.lora_A.weight, module.lora_B.weight
            bound = 1 / math.sqrt(module.in_features)
            assign(a, torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            assign(b, torch.zeros(b.shape, dtype=torch.float32))


def merged_base(model: LMModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base model's weights with the LoRA added in float32, on the CPU under the base names, as ``dtype``.

    On a sharded model every rank calls this and gathers one weight at a time; only rank 0 of the process group keeps
    them, the others get an empty mapping.
    """
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    layers = {
        f"{path}.frozen_W.weight": module for path, module in model.named_modules() if isinstance(module, LoRALinear)
    }
    state, merged = model.state_dict(keep_vars=True), {}
    with torch.no_grad():
        for name, key in base_names(model).items():
            weight = whole(state[key])
            if key in layers:
                layer = layers[key]
                a, b = whole(layer.lora_A.weight).float(), whole(layer.lora_B.weight).float()
                weight = weight.float() + layer.scaling * (b @ a)
            if keep:
                merged[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
    return merged
