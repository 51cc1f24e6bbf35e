"""The tensors of a checkpoint by name, gathered from a trainer and put back into one.

Names: ``model/NAME`` a trained parameter, ``optimizer/NAME/KEY`` its moments, ``buffer/NAME`` a buffer of the blocks,
``carried/ROW/SITE/NAME`` the state of a row of the global batch, ``random/RANK/DEVICE`` a random generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moshi_ttt.core.block import Site
from moshi_ttt.core.host import CarriedState
from moshi_ttt.training.runtime import Runtime
from moshi_ttt.training.trainer import Trainer


def all_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """All that this rank saves."""
    return {**parameters(trainer), **_carried(trainer), **random_state(trainer.runtime)}


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """The trained parameters, their moments, and the buffers of the blocks; not copies."""
    found: dict[str, Tensor] = {}
    for name, parameter in trainer.trained.trained().items():
        found[f"model/{name}"] = parameter.detach()
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"optimizer/{name}/{key}"] = value
    for name, buffer in trainer.trained.injection.named_buffers():
        found[f"buffer/{name}"] = buffer
    return found


def _rows(trainer: Trainer) -> dict[tuple[int, int], int]:
    """(micro-batch, row in it) on this rank -> row of the global batch."""
    size, runtime = trainer.config.batch_size, trainer.runtime
    return {
        (m, b): (m * runtime.world_size + runtime.rank) * size + b
        for m in range(trainer.config.num_microbatches)
        for b in range(size)
    }


def _carried(trainer: Trainer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for (m, b), row in _rows(trainer).items():
        state = trainer.carried[m]
        if state is not None and state.document_ids is not None:
            found[f"carried/{row}/document"] = state.document_ids[b : b + 1].clone()
            for site, tensors in state.blocks.items():
                for name, tensor in tensors.items():
                    found[f"carried/{row}/{site}/{name}"] = tensor[b : b + 1].detach().clone()
    return found


def _empty(stored: Any) -> Tensor:
    assert isinstance(stored, TensorStorageMetadata)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


def empty_carried(trainer: Trainer, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors for the carried state of this rank's rows; ``stored`` describes what the checkpoint holds."""
    rows = set(_rows(trainer).values())
    keys = [key for key in stored if key.startswith("carried/") and int(key.split("/")[1]) in rows]
    return {key: _empty(stored[key]) for key in keys}


def restore_carried(trainer: Trainer, carried: Mapping[str, Tensor]) -> None:
    """Give the trainer the carried state that ``empty_carried`` made room for."""
    if not carried:
        return
    places, device = _rows(trainer), trainer.runtime.device
    for m in range(trainer.config.num_microbatches):
        rows = [places[m, b] for b in range(trainer.config.batch_size)]
        parts: dict[tuple[str, ...], list[Tensor]] = {}
        for row in rows:
            for key, tensor in carried.items():
                _, number, *rest = key.split("/")
                if int(number) == row:
                    parts.setdefault(tuple(rest), []).append(tensor.to(device))
        state = CarriedState(document_ids=torch.cat(parts.pop(("document",))))
        for (site, name), tensors in parts.items():
            state.blocks.setdefault(Site.parse(site), {})[name] = torch.cat(tensors)
        blocks = trainer.trained.injection.blocks
        state.blocks = {site: blocks[site].upgrade_state(saved) for site, saved in sorted(state.blocks.items())}
        trainer.carried[m] = state


def random_state(runtime: Runtime) -> dict[str, Tensor]:
    """The state of this rank's random generators."""
    found = {f"random/{runtime.rank}/cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        found[f"random/{runtime.rank}/cuda"] = torch.cuda.get_rng_state(runtime.device)
    return found


def empty_random(trainer: Trainer, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors for those of this rank's random generators that the checkpoint holds."""
    return {key: _empty(stored[key]) for key in random_state(trainer.runtime) if key in stored}


def restore_random(runtime: Runtime, random: Mapping[str, Tensor]) -> None:
    """Set this rank's random generators."""
    for key, state in random.items():
        if key.endswith("/cpu"):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, runtime.device)
