"""The base model's own weights, whatever has been added to it: names, loading, and a digest.

What is base is decided by the modules that are there: everything but the blocks (``BlockSite``) and the factors of a
LoRA (``LoRALinear``), whose frozen matrix goes by the name it had before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.sharding import assign
from moshi_ttt.hosts.moshi.layers import BlockSite
from moshi_ttt.hosts.moshi.upstream import LMModel, LoRALinear, StreamingMultiheadAttention

DIGEST_VALUES = 16
"""How many values of each parameter the digest reads."""
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
    names, state = base_names(model), model.state_dict()
    given = present_names(model, state_dict)
    problems = [f"missing {name}" for name in sorted(names.keys() - given.keys())]
    problems += [f"unexpected {name}" for name in sorted(given.keys() - names.keys())]
    problems += [
        f"{name} is {given[name].dtype}"
        for name, key in names.items()
        if name in given and state[key].is_floating_point() and not given[name].is_floating_point()
    ]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the model {tuple(state[key].shape)}"
        for name, key in names.items()
        if name in given and given[name].shape != state[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise HostError(
            f"These are not this model's base weights: {shown}. Nothing was loaded. Give every weight of the base "
            "model and no other; adapters have a loader of their own."
        )
    with torch.no_grad():
        if any(state[key].is_meta for key in names.values()):
            # Writing into a meta tensor does nothing: the tensors themselves are put in.
            for name, key in names.items():
                _put(model, key, given[name].to(state[key].dtype))
        else:
            for name, key in names.items():
                assign(state[key], given[name])
    if any(isinstance(state[key], DTensor) for key in names.values()):
        chosen = parameter_names(model)
        dtypes = {name: state[names[name]].dtype for name in chosen}
        setattr(model, REMEMBERED, digest_of({name: given[name] for name in chosen}, dtypes))


def remember_digest(model: LMModel) -> None:
    """Keep the digest for when the model is sharded and its values are no longer at hand."""
    setattr(model, REMEMBERED, digest(model))


def _sample(values: Tensor) -> Tensor:
    return values[:: max(1, values.numel() // DIGEST_VALUES)][:DIGEST_VALUES]


def _put(model: LMModel, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        trained = module.get_parameter(leaf).requires_grad
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=trained))
    else:
        module.register_buffer(leaf, tensor)


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
    return digest_of(chosen)


def digest_of(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> str:
    """The digest of base parameters given by their base names, none of them sharded, as if they had ``dtypes``."""
    sha = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(parameters.items()):
            head = _sample(tensor.detach().reshape(-1))
            head = head.to(dtypes[name] if dtypes else head.dtype).float().cpu()
            sha.update(f"{name} {list(tensor.shape)}\n".encode())
            sha.update(head.contiguous().numpy().tobytes())
    return sha.hexdigest()


def lora_factors(model: LMModel) -> dict[str, torch.nn.Parameter]:
    """The factors of every LoRA in the model, by the names they have in it; a block has none."""
    return {
        f"{path}.{factor}.weight": getattr(module, factor).weight
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for factor in ("lora_A", "lora_B")
    }
