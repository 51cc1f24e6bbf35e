"""The base model's own weights, whatever has been added to it: names, loading, and a digest.

What is base is decided by the modules that are there: everything but the blocks (``BlockSite``) and the factors of a
LoRA (``LoRALinear``), whose frozen matrix goes by the name it had before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moshi_ttt.core.base_weights import load_base_weights, weight_digest
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.upstream import LMModel, LoRALinear, StreamingMultiheadAttention

REMEMBERED = "_moshi_ttt_base_digest"


def base_names(model: LMModel) -> dict[str, str]:
    """Base name -> the key it has in ``model.state_dict()`` now."""
    added: list[str] = []
    frozen: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, BlockSite):
            added.append(f"{path}.")
        elif isinstance(module, LoRALinear):
            added += [f"{path}.lora_A.", f"{path}.lora_B."]
            frozen.append((f"{path}.frozen_W.", f"{path}."))
    names = {}
    for key in model.state_dict(keep_vars=True):
        if key.startswith(tuple(added)):
            continue
        base = next((new + key.removeprefix(old) for old, new in frozen if key.startswith(old)), key)
        names[base] = key
    return names


def parameter_names(model: LMModel) -> set[str]:
    """The base names of parameters; the other base names are of buffers."""
    parameters = {key for key, _ in model.named_parameters()}
    return {name for name, key in base_names(model).items() if key in parameters}


def base_state_dict(model: LMModel) -> dict[str, Tensor]:
    """The base model's parameters and buffers under its own names, detached, sharing storage with the model."""
    state = model.state_dict()
    return {name: state[key] for name, key in base_names(model).items()}


def present_names(model: LMModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same base weights, by the names that ``model`` has for what older checkpoints call otherwise."""
    given = dict(state_dict)
    for path, module in model.named_modules():
        if isinstance(module, StreamingMultiheadAttention):
            StreamingMultiheadAttention._load_hook(module, given, f"{path}.")  # type: ignore[no-untyped-call]
    return given


def load_base(model: LMModel, state_dict: Mapping[str, Tensor]) -> None:
    """Load base weights, older names included, cast to the model's dtypes.

    A sharded model takes its part of each weight; every rank calls this with the same weights. Raises HostError with
    the missing and unexpected names, wrong shapes and weights that are no floating-point numbers; the model is then as
    it was.
    """
    names, given = base_names(model), present_names(model, state_dict)
    load_base_weights(model, names, given)
    state = model.state_dict()
    if any(isinstance(state[key], DTensor) for key in names.values()):
        chosen = parameter_names(model)
        dtypes = {name: state[names[name]].dtype for name in chosen}
        setattr(model, REMEMBERED, weight_digest({name: given[name] for name in chosen}, dtypes))


def remember_digest(model: LMModel) -> None:
    """Keep the digest for when the model is sharded and its values are no longer at hand."""
    setattr(model, REMEMBERED, digest(model))


def digest(model: LMModel) -> str | None:
    """SHA-256 over name, shape and some values, evenly spread, of every base parameter, as float32.

    The same whether bfloat16 weights were loaded as bfloat16 or as float32, and with or without blocks. None where the
    values are not at hand: on the meta device, or sharded without ``remember_digest`` before.
    """
    remembered: str | None = getattr(model, REMEMBERED, None)
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[key] for name, key in sorted(base_names(model).items()) if key in parameters}
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in chosen.values()):
        return remembered
    return weight_digest(chosen)


def lora_factors(model: LMModel) -> dict[str, torch.nn.Parameter]:
    """The factors of every LoRA in the model, by the names they have in it; a block has none."""
    return {
        f"{path}.{factor}.weight": getattr(module, factor).weight
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for factor in ("lora_A", "lora_B")
    }
