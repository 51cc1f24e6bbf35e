"""The model of a run: planned and sharded on the meta device, then filled. The ranks' number changes no value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moshi_ttt.configs.settings import Settings
from moshi_ttt.configs.training import RunConfig
from moshi_ttt.core.adapter import fill_from_adapter, find_adapter, read_manifest
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.injection import make_plan
from moshi_ttt.core.losses import HostLosses
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.sharding import shard
from moshi_ttt.hosts.moshi import lora
from moshi_ttt.hosts.moshi.compatibility import require_trainable
from moshi_ttt.hosts.moshi.depformer import make_steps_contiguous
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.loading import MoshiBundle
from moshi_ttt.hosts.moshi.stored_lora import StoredLoRA
from moshi_ttt.training.trained import TrainedModel


def losses_of(run: RunConfig) -> HostLosses:
    """The losses that a run minimizes."""
    return MOSHI_HOST.losses(
        first_codebook=run.first_codebook_weight_multiplier, text_padding=run.text_padding_weight, text=run.text_weight
    )


def skeleton(settings: Settings, registry: Registry | None = None) -> TrainedModel:
    """The model on the meta device, LoRA and blocks in it, with exactly the trained parameters requiring gradients.

    Raises:
        HostError: a model that cannot be trained here.
        InjectionError: the plan does not fit the model.
    """
    run, host = settings.run, MOSHI_HOST
    model = host.skeleton(settings.host)
    require_trainable(model, settings.host.hf_repo)
    registry = registry or default_registry()
    policy = registry.policy(settings.ttt.precision)
    roles = policy.roles(model.dtype)
    if run.lora.enable:
        lora.add_lora(model, rank=run.lora.rank, scaling=run.lora.scaling)
    plan = make_plan(model, host, settings.ttt.ttt, policy=policy, registry=registry, seed=settings.ttt.seed)
    built = TrainedModel(model, plan.apply(model), roles, losses_of(run))
    for block in built.injection.blocks.values():
        block.check_shardable()
    if run.inner_lr_warmup:
        built.injection.check_scales_inner_lr()
    choose_trained(built, full=run.full_finetuning, embeddings=run.lora.enable and run.lora.ft_embed)
    for stack in (model.transformer, model.depformer):
        stack.checkpointing = run.gradient_checkpointing
    check_trained(built, settings)
    make_steps_contiguous(model)
    if run.compile:
        for block in built.injection.blocks.values():
            block.compile_compute()
    return built


def build(
    settings: Settings, mesh: DeviceMesh, device: torch.device, *, registry: Registry | None = None,
    resumed: bool = False,
) -> TrainedModel:  # fmt: skip
    """The model of a run, sharded over ``mesh`` and filled: base weights from their file, the rest from the adapter
    that the run starts from, or from the seed.

    Equal on every number of ranks. Raises as ``skeleton``, HostError when the weights are not this model's, and
    AdapterError when the adapter is not. ``resumed`` leaves the adapter alone, and what is trained without values: the
    checkpoint has all of them, and is to be loaded next.
    """
    built, bundle = skeleton(settings, registry), settings.host.bundle()
    continued = continued_lora(settings, bundle)
    weights = bundle.base_weights(built.model, lora=continued is None)
    if continued is not None:
        weights |= continued.trained_beside()
    shard(MOSHI_HOST, built.model, built.roles, mesh)
    built.model.to_empty(device=device)
    MOSHI_HOST.load_base(built.model, weights)
    adapter = None if settings.run.adapter is None or resumed else find_adapter(settings.run.adapter)
    if continued is not None:
        continued.fill(built.model)
    elif not resumed and (adapter is None or not read_manifest(adapter)["extra"]):
        lora.initialize_lora(built.model, settings.run.seed)
    built.injection.initialize(saved=adapter is None and not resumed)
    if adapter is not None:
        built = replace(built, notes=tuple(fill_from_adapter(built.injection, adapter, registry=registry)))
    built.injection.check_precision("initialized")
    check_trained(built, settings)
    built.model.train()
    return built


def check_trained(built: TrainedModel, settings: Settings) -> None:
    """Raise HostError unless what requires gradients is what the config declares, to the parameter."""
    run, groups = settings.run, built.groups()
    declared = {
        "ttt": built.injection.plan.parameters,
        "lora": sum(parameter.numel() for parameter in MOSHI_HOST.extra_parameters(built.model).values()),
    }
    actual: dict[str, int] = {}
    for group, members in groups.items():
        kind = "ttt" if group == "gates" else group
        actual[kind] = actual.get(kind, 0) + sum(parameter.numel() for parameter in members.values())
    base = "base" in actual
    if (
        any(actual.get(name, 0) != count for name, count in declared.items())
        or bool(declared["lora"]) != run.lora.enable
        or base != (run.full_finetuning or (run.lora.enable and run.lora.ft_embed))
    ):
        raise HostError(
            f"What is trained is not what the config declares: {declared} is declared, {actual} is trained."
        )


def continued_lora(settings: Settings, bundle: MoshiBundle) -> StoredLoRA | None:
    """The LoRA that comes with the model where the run trains it further; otherwise it is merged into the weights.

    Raises HostError when the run's LoRA is not of its size, or would leave out embeddings that were trained beside it.
    """
    run, stored = settings.run, bundle.lora
    if stored is None or not run.lora.enable:
        return None
    if (run.lora.rank, run.lora.scaling) != (stored.rank, stored.scaling):
        raise HostError(
            f"{bundle.name} comes with a LoRA of rank {stored.rank} and scaling {stored.scaling:g} ({stored.path}), "
            f"and lora asks for rank {run.lora.rank} and scaling {run.lora.scaling:g}. Ask for the same to train it "
            "further, or set lora.enable: false, which merges it into the base weights."
        )
    if (beside := sorted(stored.trained_beside())) and not run.lora.ft_embed:
        raise HostError(
            f"{stored.path} holds embeddings that were trained beside its LoRA ({beside[0]} and others). Set "
            "lora.ft_embed: true to train both further, or lora.enable: false, which merges both into the base weights."
        )
    return stored


def choose_trained(built: TrainedModel, *, full: bool, embeddings: bool) -> None:
    """Set ``requires_grad``, and give trained parameters of the base and of LoRA the master dtype."""
    model = built.model
    blocks = {id(parameter) for parameter in built.injection.parameters()}
    chosen = set(blocks) | {id(parameter) for parameter in MOSHI_HOST.extra_parameters(model).values()}
    if embeddings:
        tables = (model.emb, model.text_emb, model.depformer_emb, model.depformer_text_emb)
        chosen |= {id(parameter) for table in tables for parameter in table.parameters()}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            trained = full or id(parameter) in chosen
            if trained and id(parameter) not in blocks and parameter.dtype != built.roles.master:
                master = nn.Parameter(parameter.detach().to(built.roles.master))
                module.register_parameter(name, master)
                parameter = master
            parameter.requires_grad_(trained)
