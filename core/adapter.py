"""Adapter checkpoints: what training saves, and how it comes back into a model.

The folder on disk is ``adapter_folder``. Loading is strict both ways and checks everything before the model is touched
(``adapter_fit``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moshi_ttt.core.adapter_fit import (
    check_fingerprint,
    check_provenance,
    check_tensors,
    major_version,
    parse_site,
    qualified,
    variant_name,
)
from moshi_ttt.core.adapter_folder import (
    EXTRA,
    FORMAT_VERSION,
    MANIFEST,
    TENSORS,
    AdapterContents,
    adapter_entries,
    check_replaceable,
    find_adapter,
    read_manifest,
    read_tensors,
)
from moshi_ttt.core.block import SequenceBlock, Site
from moshi_ttt.core.errors import AdapterError, ConfigError, InjectionError, MoshiTTTError, PluginError
from moshi_ttt.core.injection import Injection, PlannedBlock, make_plan
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.sharding import assign, whole

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "TENSORS",
    "AdapterContents",
    "adapter_entries",
    "collect_adapter",
    "fill_from_adapter",
    "find_adapter",
    "load_adapter",
    "major_version",
    "read_manifest",
    "save_adapter",
]


def save_adapter(injection: Injection, folder: str | Path, *, training_step: int = 0) -> Path:
    """Write the blocks' parameters, and the host's extra parameters (a LoRA), to ``folder``.

    Replaces an adapter that is there. Written to a temporary folder beside it, synced, then renamed: a reader sees the
    old adapter or the new one. Raises AdapterError when ``folder`` exists and is not an adapter. Of a sharded model,
    every rank calls ``collect_adapter``, the writing one with ``keep=True`` and the others with ``keep=False``.
    """
    check_replaceable(user_path(folder).resolve())
    return collect_adapter(injection, training_step=training_step).write(folder)


def collect_adapter(
    injection: Injection,
    *,
    training_step: int = 0,
    fingerprint: Mapping[str, Any] | None = None,
    extra: bool = True,
    keep: bool = True,
) -> AdapterContents:
    """Gather the contents of an adapter of this model from all ranks; every rank must call this.

    Tensors are gathered one at a time, and copied to the CPU where they are kept.

    Args:
        injection: the blocks.
        training_step: what the manifest says.
        fingerprint: of the base model it belongs to, where that is not the one in memory.
        extra: False leaves out what the host was given beside the blocks, which has been merged into that base model.
        keep: False on ranks that do not write the adapter: they take part, and hold one gathered tensor at most.

    Raises:
        AdapterError: the injection was removed, or its inner learning rate is in mid-schedule.
    """
    factors = {block.inner_lr_factor for block in _blocks(injection, "saved").values()} - {1.0}
    if factors:
        raise AdapterError(
            f"The inner learning rate is scaled by {', '.join(map(str, sorted(factors)))}, which an adapter does not "
            "keep: whoever loads it would compute something else. Call injection.set_inner_lr_factor(1) when the "
            "schedule has ended. Nothing was saved."
        )
    own = _own_tensors(injection)
    others = injection.host.extra_parameters(injection.model) if extra else {}
    own |= {EXTRA + name: parameter for name, parameter in others.items()}
    tensors = {}
    for name, tensor in own.items():
        gathered = whole(tensor.detach())  # a collective of its own for each tensor, where it is sharded
        if keep:
            tensors[name] = gathered.to("cpu", copy=True).contiguous()
        del gathered
    manifest = {
        "format_version": FORMAT_VERSION,
        "host": injection.host.name,
        "fingerprint": dict(fingerprint or injection.host.fingerprint(injection.model)),
        "precision": injection.plan.policy.name,
        "seed": injection.plan.seed,
        "training_step": training_step,
        "extra": injection.host.describe_extra(injection.model) if extra else {},
        "sites": [_describe(planned) for planned in injection.plan.blocks],
    }
    return AdapterContents(tensors, manifest, kept=keep)


def load_adapter(model: nn.Module, folder: str | Path, *, registry: Registry | None = None) -> Injection:
    """Inject the blocks of an adapter into its base model and fill them; bit-equal to what was saved.

    A LoRA that the adapter was trained with is added where the model has none, and filled in the model's dtype.

    Raises:
        AdapterError: the folder is not an adapter, is damaged or incomplete, belongs to another host or model, or needs
            a plugin that is not installed. The model is untouched.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"An adapter is loaded into a model, got {model!r}. load_model loads a base model.")
    registry = registry or default_registry()
    folder = user_path(folder)
    manifest = read_manifest(folder)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise AdapterError(f"{folder}: the model is on the meta device and cannot hold values; load its weights first.")
    try:
        host = registry.host(str(manifest["host"]))
        check_fingerprint(folder, manifest["fingerprint"], host, model)
        present = host.describe_extra(model)
        if present and present != manifest["extra"]:
            raise AdapterError(
                f"{folder} was trained with {manifest['extra'] or 'nothing'} beside the base model, and this model has "
                f"{present}. Load the adapter into the base model alone: it brings what it needs."
            )
        entries = [parse_site(entry, registry) for entry in manifest["sites"]]
        check_provenance(folder, manifest["sites"], registry)
        policy = registry.policy(manifest["precision"])
        plan = make_plan(model, host, entries, policy=policy, registry=registry, seed=manifest["seed"])
        if sorted(str(block.site) for block in plan.blocks) != sorted(entry["site"] for entry in manifest["sites"]):
            raise AdapterError(f"{folder}: the sites in {MANIFEST} are not those that its blocks take.")
    except AdapterError:
        raise
    except (MoshiTTTError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder}: it does not fit this model or installation. {error}") from error
    tensors = read_tensors(folder / TENSORS)
    added = not present and bool(manifest["extra"])
    try:
        if added:
            host.add_extra(model, manifest["extra"])
        extra = host.extra_parameters(model)
        check_tensors(folder, plan.blocks, extra, tensors)
        beside = {name: tensors.pop(EXTRA + name) for name in extra}
        injection = plan.apply(model, tensors)
        for name, parameter in extra.items():
            assign(parameter, beside[name])
        return injection
    except BaseException as error:
        if host.blocks(model):
            host.detach(model)
        if added:
            host.remove_extra(model)
        if isinstance(error, MoshiTTTError) or not isinstance(error, Exception):
            raise
        raise AdapterError(f"{folder}: it does not fit this model. {error}") from error


def fill_from_adapter(injection: Injection, folder: str | Path, *, registry: Registry | None = None) -> list[str]:
    """Fill the blocks of a model, sharded or not, with the values of an adapter; every rank must call this.

    The adapter's blocks must be those of the model: the same sites and variants, and parameters of the same names,
    shapes and dtypes. Their other options may differ. The adapter's LoRA goes into the model's, which must be of the
    same rank and scaling; where the adapter has none, the model's LoRA keeps its values.

    Returns:
        A sentence for each block whose options are not those that the adapter was trained with.

    Raises:
        AdapterError: the adapter is damaged, or of another base model, or does not fit. No value was written.
    """
    folder, host, model = user_path(folder), injection.host, injection.model
    _blocks(injection, "loaded")
    manifest = read_manifest(folder)
    check_fingerprint(folder, manifest["fingerprint"], host, model)
    try:
        registry = registry or default_registry()
        check_provenance(folder, manifest["sites"], registry)
        saved = {str(entry["site"]): entry["config"] for entry in manifest["sites"]}
        given = {str(entry["site"]): variant_name(entry, registry) for entry in manifest["sites"]}
    except (ConfigError, PluginError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder}: it does not fit this installation. {error}") from error
    planned = {str(block.site): block for block in injection.plan.blocks}
    have = {
        site: qualified(block.variant.name, block.variant.provenance.distribution, registry)
        for site, block in planned.items()
    }
    if have != given:
        raise AdapterError(
            f"{folder} holds the blocks {_listed(given)}, and this model has {_listed(have)}. Ask for the same blocks "
            "in `ttt`."
        )
    beside = manifest["extra"]
    if beside and beside != host.describe_extra(model):
        raise AdapterError(
            f"{folder} was trained with {beside} beside the base model, and this model has "
            f"{host.describe_extra(model) or 'nothing'}. Ask for the same."
        )
    extra = host.extra_parameters(model) if beside else {}
    tensors = read_tensors(folder / TENSORS)
    check_tensors(folder, injection.plan.blocks, extra, tensors)
    for name, tensor in {**_own_tensors(injection), **{EXTRA + name: p for name, p in extra.items()}}.items():
        assign(tensor, tensors[name])
    return [note for site, block in planned.items() if (note := _changed_options(block, saved[site]))]


def _changed_options(block: PlannedBlock, saved: Mapping[str, Any]) -> str:
    """A sentence that names the options that are not those an adapter's block was trained with; empty if all are.

    An option that was added after the adapter was made had its default then.
    """
    now = block.config.learned_options()
    fields = type(block.config).model_fields
    was = {key: field.get_default(call_default_factory=True) for key, field in fields.items()} | dict(saved)
    was = {key: value for key, value in was.items() if key not in block.config.machine_options}
    changed = {key: (was.get(key), now.get(key)) for key in sorted({*saved, *now})}
    listed = [f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items() if old != new]
    return f"{block.site}: the adapter was trained with other options: {'; '.join(listed)}." if listed else ""


def _blocks(injection: Injection, done: str) -> dict[Site, SequenceBlock]:
    """The injection's blocks, or AdapterError where they are no longer in the model."""
    try:
        return injection.blocks
    except InjectionError as error:
        raise AdapterError(f"{error} Nothing was {done}.") from None


def _listed(blocks: Mapping[str, str]) -> str:
    return ", ".join(f"{site} ({variant})" for site, variant in sorted(blocks.items())) or "of no site"


def _describe(planned: PlannedBlock) -> dict[str, Any]:
    provenance = planned.variant.provenance
    return {
        "site": str(planned.site),
        "plugin": provenance.plugin,
        "distribution": provenance.distribution,
        "version": provenance.version,
        "config": planned.config.learned_options(),
    }


def _own_tensors(injection: Injection) -> dict[str, Tensor]:
    """What an adapter holds of the blocks: parameters, which may be sharded, and persistent buffers."""
    try:
        return {**dict(injection.named_parameters()), **dict(injection.named_buffers())}
    except ConfigError as error:
        raise AdapterError(f"{error} Nothing was saved.") from error
