"""A LoRA in a file, as moshi-finetune and training here write it: factors, and embeddings trained beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from moshi_ttt.core.errors import HostError
from moshi_ttt.core.sharding import assign
from moshi_ttt.hosts.moshi.base_weights import lora_factors, present_names
from moshi_ttt.hosts.moshi.upstream import LMModel

LORA_FILE = "lora.safetensors"
"""What moshi-finetune calls the file beside its config.json."""
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class StoredLoRA:
    """A file with a LoRA: y = W x + scaling B A x, A ``[rank, in]``, B ``[out, rank]``."""

    path: Path
    rank: int
    scaling: float

    def factors(self, model: LMModel) -> dict[str, Tensor]:
        """The factors, by the names they have in ``model``. Raises HostError."""
        stored = {name: tensor for name, tensor in self._read().items() if name.endswith((A, B))}
        if not stored:
            raise HostError(f"{self.path} holds no LoRA: no name in it ends with {A}. Give the file that was saved.")
        factors = present_names(model, stored)
        for name, tensor in factors.items():
            other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
            if other not in factors:
                raise HostError(f"{self.path} has {name} and no {other}: it is incomplete. Save it again.")
            rank = tensor.shape[0 if name.endswith(A) else -1]
            if rank != self.rank:
                raise HostError(
                    f"{self.path} holds a LoRA of rank {rank}, and the config.json that belongs to it says lora_rank "
                    f"{self.rank}. Give the two that were saved together."
                )
        return factors

    def trained_beside(self) -> dict[str, Tensor]:
        """The base weights that were trained beside the LoRA, by their names: embeddings, or none. Raises HostError."""
        return {name: tensor for name, tensor in self._read().items() if not name.endswith((A, B))}

    def _read(self) -> dict[str, Tensor]:
        try:
            return load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise HostError(f"{self.path} cannot be read as safetensors: {error}.") from None

    def fill(self, model: LMModel) -> None:
        """Give the LoRA of ``model``, sharded or not, the factors of the file. Raises HostError unless they fit."""
        factors, own = self.factors(model), lora_factors(model)
        problems = [f"missing {name}" for name in sorted(own.keys() - factors.keys())]
        problems += [f"unexpected {name}" for name in sorted(factors.keys() - own.keys())]
        problems += [
            f"{name} is {tuple(factors[name].shape)}, the model's {tuple(own[name].shape)}"
            for name in sorted(own.keys() & factors.keys())
            if factors[name].shape != own[name].shape
        ]
        if problems:
            raise HostError(f"The LoRA in {self.path} is not this model's: {'; '.join(problems[:8])}.")
        for name, parameter in own.items():
            assign(parameter, factors[name])


def is_lora(path: Path) -> bool:
    """Whether ``path`` is a file of safetensors with factors of a LoRA and without a model."""
    try:
        with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
            names = set(handle.keys())
    except (OSError, SafetensorError):
        return False
    return any(name.endswith(A) for name in names) and not any(name.startswith("out_norm.") for name in names)


def with_stored_lora(model: LMModel, weights: Mapping[str, Tensor], lora: StoredLoRA) -> dict[str, Tensor]:
    """The base weights of ``model`` with a LoRA merged into them in float32, each in its dtype in ``weights``.

    Base weights that were trained beside the LoRA take the place of the model's. Raises HostError unless all fit.
    """
    factors, trained = lora.factors(model), lora.trained_beside()
    layers = {name.removesuffix(A) + ".weight": name.removesuffix(A) for name in factors if name.endswith(A)}
    shapes: dict[str, tuple[int, ...]] = {
        name: (factors[layer + B].shape[0], factors[layer + A].shape[1]) for name, layer in layers.items()
    }
    shapes |= {name: tuple(tensor.shape) for name, tensor in trained.items()}
    problems = [
        f"{name} is for a weight of shape {shape}, the model's is "
        f"{tuple(weights[name].shape) if name in weights else 'missing'}"
        for name, shape in sorted(shapes.items())
        if name not in weights or tuple(weights[name].shape) != shape
    ]
    if problems:
        raise HostError(f"The LoRA in {lora.path} is not this model's: {'; '.join(problems[:8])}.")
    merged = dict(weights)
    for name, layer in layers.items():
        change = lora.scaling * (factors[layer + B].float() @ factors[layer + A].float())
        merged[name] = (weights[name].float() + change).to(weights[name].dtype)
    return merged | {name: tensor.to(weights[name].dtype) for name, tensor in trained.items()}
