"""The base model's own weights in a host: strict loading, and a digest that ties an adapter to its model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.sharding import assign

DIGEST_VALUES = 16
"""How many values of each parameter the digest reads."""


def load_base_weights(model: nn.Module, names: Mapping[str, str], given: Mapping[str, Tensor]) -> None:
    """Load base weights into a model with or without blocks, cast to the model's dtypes.

    A sharded model takes its part of each weight; every rank calls this with the same weights. Weights that are on the
    meta device are replaced by those that are given.

    Args:
        model: the host's.
        names: base name -> the key it has in ``model.state_dict()`` now; all weights of the base model and no other.
        given: weights by base name.

    Raises:
        HostError: missing and unexpected names, wrong shapes, weights that are no floating-point numbers; the model is
            then as it was.
    """
    state = model.state_dict()
    problems = [f"missing {name}" for name in sorted(names.keys() - given.keys())]
    problems += [f"unexpected {name}" for name in sorted(given.keys() - names.keys())]
    shared = {name: state[key] for name, key in names.items() if name in given}
    problems += [
        f"{name} is {given[name].dtype}"
        for name, tensor in shared.items()
        if tensor.is_floating_point() and not given[name].is_floating_point()
    ]
    problems += [
        f"{name} has shape {tuple(given[name].shape)}, the model {tuple(tensor.shape)}"
        for name, tensor in shared.items()
        if given[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise HostError(
            f"These are not this model's base weights: {shown}. Nothing was loaded. Give every weight of the base "
            "model and no other; adapters have a loader of their own."
        )
    with torch.no_grad():
        for name, key in names.items():
            if state[key].is_meta:  # writing into a meta tensor does nothing: the tensor itself is put in
                _put(model, key, given[name].to(state[key].dtype))
            else:
                assign(state[key], given[name])


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    path, _, leaf = key.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        trained = module.get_parameter(leaf).requires_grad
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trained))
    else:
        module.register_buffer(leaf, tensor)


def weight_digest(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None) -> str | None:
    """SHA-256 over name, shape and some values, evenly spread, of every base parameter by its base name, as float32.

    The same whether bfloat16 weights were loaded as bfloat16 or as float32. With ``dtypes`` it is as if the parameters
    had those. None where values are not at hand: on the meta device, or sharded.
    """
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in parameters.values()):
        return None
    sha = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(parameters.items()):
            values = tensor.detach().reshape(-1)
            values = values[:: max(1, values.numel() // DIGEST_VALUES)][:DIGEST_VALUES]
            values = values.to(dtypes[name] if dtypes else values.dtype).float().cpu()
            sha.update(f"{name} {list(tensor.shape)}\n".encode())
            sha.update(values.contiguous().numpy().tobytes())
    return sha.hexdigest()
