"""Export a checkpoint: an adapter folder, and a LoRA file or merged weights that stock Moshi loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import get_rank

from moshi_ttt.configs.settings import Settings
from moshi_ttt.core.adapter import collect_adapter
from moshi_ttt.core.base_weights import weight_digest
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.sharding import whole
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.base_weights import parameter_names
from moshi_ttt.hosts.moshi.upstream import loaders
from moshi_ttt.training.trained import TrainedModel

ADAPTER = "adapter"
CONSOLIDATED = "consolidated"
WITHOUT_BLOCKS = (
    f"{CONSOLIDATED}/ does not hold the test-time-training blocks: a Moshi that loads it computes without them. The "
    f"blocks are in {ADAPTER}/."
)
"""What is said where a ``consolidated/`` is written that lacks the blocks of its model."""


def check(settings: Settings) -> None:
    """Raise ConfigError when what is trained cannot be exported as asked."""
    run = settings.run
    if run.save_adapters and run.lora.enable and run.lora.ft_embed and settings.ttt.ttt:
        raise ConfigError(
            "lora.ft_embed trains embeddings, which an adapter of TTT blocks does not hold. "
            "Set save_adapters: false, which merges them into full weights, or lora.ft_embed: false."
        )


def lacks_blocks(settings: Settings) -> bool:
    """Whether the run writes a ``consolidated/``, and trains blocks that are not in it."""
    run = settings.run
    return bool(settings.ttt.ttt) and (run.lora.enable or run.full_finetuning)


def prepare(trained: TrainedModel, settings: Settings, step: int) -> Callable[[Path], None]:
    """Gather what is exported, on every rank together, and return what writes it into a folder, on one.

    An ``adapter/`` of blocks and LoRA; ``consolidated/`` with a ``config.json`` and either ``lora.safetensors`` or,
    when the base was trained or ``save_adapters`` is false, the whole model merged in ``consolidated.safetensors``.
    """
    run = settings.run
    if run.full_finetuning or (run.lora.enable and not run.save_adapters):
        return _merged(trained, settings, step)
    adapter = weights = None
    if not (run.lora.enable and run.lora.ft_embed):
        adapter = collect_adapter(trained.injection, training_step=step, keep=get_rank() == 0)
    if run.lora.enable:
        blocks = {id(parameter) for parameter in trained.injection.parameters()}
        weights = {}
        for name, parameter in trained.trained().items():
            if id(parameter) not in blocks:
                gathered = whole(parameter).detach()  # by all ranks together; one of them writes
                if get_rank() == 0:
                    weights[name] = gathered.to("cpu", trained.roles.param, copy=True)
    config = {**_model_config(settings), "lora": True, "lora_rank": run.lora.rank, "lora_scaling": run.lora.scaling}

    def write(folder: Path) -> None:
        if weights is not None:
            _write_weights(folder, "lora.safetensors", weights, config, settings)
        if adapter is not None:
            adapter.write(folder / ADAPTER)

    return write


def _merged(trained: TrainedModel, settings: Settings, step: int) -> Callable[[Path], None]:
    """The whole base model, LoRA merged into it, and an adapter of the blocks alone that belongs to it."""
    model = trained.model
    weights = lora.merged_base(model, trained.roles.param)
    adapter = None
    if trained.injection.blocks:
        fingerprint = trained.injection.host.fingerprint(model)
        named = parameter_names(model)
        fingerprint["weights"] = weight_digest({name: weight for name, weight in weights.items() if name in named})
        adapter = collect_adapter(
            trained.injection, training_step=step, fingerprint=fingerprint, extra=False, keep=get_rank() == 0
        )  # fmt: skip
    config = {**_model_config(settings), "lora": False}

    def write(folder: Path) -> None:
        _write_weights(folder, "consolidated.safetensors", weights, config, settings)
        if adapter is not None:
            adapter.write(folder / ADAPTER)

    return write


def _model_config(settings: Settings) -> dict[str, Any]:
    """What the config.json of the base model says; the published architecture where it has none."""
    own = settings.host.bundle().info.raw_config
    return dict(loaders._lm_kwargs if own is None else own)


def _write_weights(
    folder: Path, name: str, weights: dict[str, Tensor], config: dict[str, Any], settings: Settings
) -> None:
    target = folder / CONSOLIDATED
    target.mkdir()
    save_file(weights, target / name)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if lacks_blocks(settings):
        (target / "README.txt").write_text(WITHOUT_BLOCKS + "\n", encoding="utf-8")
