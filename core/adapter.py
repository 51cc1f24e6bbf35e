"""Adapter checkpoints: what training saves. A folder of ``adapter.safetensors`` and ``adapter.json``.

The tensors have exact dtypes. The JSON says what they belong to: format version, each site's variant, plugin,
distribution, version and config, the host's fingerprint, the precision policy, the training step. Loading is strict
both ways and checks everything before the model is touched. Saving is atomic: the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.block import SequenceBlock, Site
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import AdapterError, ConfigError, InjectionError, MoshiTTTError, PluginError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.injection import Injection, Plan, PlannedBlock, make_plan
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.registrar import RUNTIME, Provenance
from moshi_ttt.core.registry import Registry, default_registry
from moshi_ttt.core.sharding import assign, whole

FORMAT_VERSION = 2
TENSORS = "adapter.safetensors"
MANIFEST = "adapter.json"
EXTRA = "host."
"""Prefix of what a host was given beside the blocks: a LoRA's factors."""
KEYS = {"format_version", "host", "fingerprint", "precision", "seed", "training_step", "extra", "sites"}


@dataclass(frozen=True)
class AdapterContents:
    """An adapter in memory: its tensors, on the CPU, and its manifest.

    Attributes:
        tensors: none on a rank that keeps none.
        kept: False on such a rank.
    """

    tensors: Mapping[str, Tensor]
    manifest: Mapping[str, Any]
    kept: bool = True

    def write(self, folder: str | Path) -> Path:
        """Write to ``folder``, replacing an adapter that is there; see ``save_adapter``.

        Raises AdapterError also on a rank that kept no tensors.
        """
        if not self.kept:
            raise AdapterError(
                "This rank took part in gathering the adapter and kept none of its tensors (keep=False). Write it on "
                "the rank that kept them. Nothing was saved."
            )
        folder = user_path(folder).resolve()
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            save_file(dict(self.tensors), temporary / TENSORS)
            (temporary / MANIFEST).write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")
        return folder


def save_adapter(injection: Injection, folder: str | Path, *, training_step: int = 0) -> Path:
    """Write the blocks' parameters, and the host's extra parameters (a LoRA), to ``folder``.

    Replaces an adapter that is there. Written to a temporary folder beside it, synced, then renamed: a reader sees the
    old adapter or the new one. Raises AdapterError when ``folder`` exists and is not an adapter. Of a sharded model,
    every rank calls ``collect_adapter``, the writing one with ``keep=True`` and the others with ``keep=False``.
    """
    _check_replaceable(user_path(folder).resolve())
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
        _check_fingerprint(folder, manifest["fingerprint"], host, model)
        present = host.describe_extra(model)
        if present and present != manifest["extra"]:
            raise AdapterError(
                f"{folder} was trained with {manifest['extra'] or 'nothing'} beside the base model, and this model has "
                f"{present}. Load the adapter into the base model alone: it brings what it needs."
            )
        entries = [_parse_site(entry, registry) for entry in manifest["sites"]]
        _check_provenance(folder, manifest["sites"], registry)
        policy = registry.policy(manifest["precision"])
        plan = make_plan(model, host, entries, policy=policy, registry=registry, seed=manifest["seed"])
        if sorted(str(block.site) for block in plan.blocks) != sorted(entry["site"] for entry in manifest["sites"]):
            raise AdapterError(f"{folder}: the sites in {MANIFEST} are not those that its blocks take.")
    except AdapterError:
        raise
    except (MoshiTTTError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder}: it does not fit this model or installation. {error}") from error
    tensors = _read_tensors(folder / TENSORS)
    added = not present and bool(manifest["extra"])
    try:
        if added:
            host.add_extra(model, manifest["extra"])
        extra = host.extra_parameters(model)
        _check_tensors(folder, plan, extra, tensors)
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


def find_adapter(folder: str | Path) -> Path:
    """The adapter at ``folder``: the folder itself, or the one inside a checkpoint of a run. Raises AdapterError."""
    folder = user_path(folder)
    for place in (folder, folder / "adapter"):
        if (place / MANIFEST).is_file():
            return place
    raise AdapterError(f"{folder} is no adapter, and no checkpoint that holds one: there is no {MANIFEST} in it.")


def adapter_entries(folder: str | Path) -> dict[str, Any]:
    """The config that gives the blocks of an adapter: ``precision``, and ``ttt`` with an entry for each block.

    Raises AdapterError.
    """
    manifest = read_manifest(folder)
    try:
        entries = [{**entry["config"], "layers": Site.parse(entry["site"]).layer} for entry in manifest["sites"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{user_path(folder) / MANIFEST}: its sites cannot be read: {error!r}.") from None
    return {"precision": manifest["precision"], "ttt": entries}


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
    _check_fingerprint(folder, manifest["fingerprint"], host, model)
    try:
        registry = registry or default_registry()
        _check_provenance(folder, manifest["sites"], registry)
        saved = {str(entry["site"]): entry["config"] for entry in manifest["sites"]}
        given = {str(entry["site"]): _variant(entry, registry) for entry in manifest["sites"]}
    except (ConfigError, PluginError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder}: it does not fit this installation. {error}") from error
    planned = {str(block.site): block for block in injection.plan.blocks}
    have = {
        site: _qualified(block.variant.name, block.variant.provenance.distribution, registry)
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
    tensors = _read_tensors(folder / TENSORS)
    _check_tensors(folder, injection.plan, extra, tensors)
    for name, tensor in {**_own_tensors(injection), **{EXTRA + name: p for name, p in extra.items()}}.items():
        assign(tensor, tensors[name])
    notes = []
    for site, block in planned.items():
        now = block.config.model_dump(mode="json", exclude={"layers", "distribution"})
        fields = type(
            block.config
        ).model_fields  # an adapter from before an option was there was trained at its default
        was = {key: field.get_default(call_default_factory=True) for key, field in fields.items()} | saved[site]
        changed = {key: (was.get(key), now.get(key)) for key in sorted({*saved[site], *now})}
        listed = [f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items() if old != new]
        if listed:
            notes.append(f"{site}: the adapter was trained with other options: {'; '.join(listed)}.")
    return notes


def _blocks(injection: Injection, done: str) -> dict[Site, SequenceBlock]:
    """The injection's blocks, or AdapterError where they are no longer in the model."""
    try:
        return injection.blocks
    except InjectionError as error:
        raise AdapterError(f"{error} Nothing was {done}.") from None


def _listed(blocks: Mapping[str, str]) -> str:
    return ", ".join(f"{site} ({variant})" for site, variant in sorted(blocks.items())) or "of no site"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of ``adapter.json``, checked for completeness. Raises AdapterError."""
    path = user_path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(
            f"{path.parent} is not an adapter: it has no {MANIFEST}. Give the folder that save_adapter wrote; in a "
            "checkpoint of a training it is adapter/."
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. The adapter is damaged; save it again.") from None
    if not isinstance(manifest, dict) or not manifest.keys() >= KEYS:
        raise AdapterError(f"{path} is incomplete: it needs {sorted(KEYS)}. The adapter is damaged; save it again.")
    if unknown := sorted(manifest.keys() - KEYS):
        raise AdapterError(f"{path} has unknown keys {unknown}; this version knows {sorted(KEYS)}.")
    if not all(type(manifest[key]) is int for key in ("format_version", "seed", "training_step")):
        raise AdapterError(f"{path}: format_version, seed and training_step must be whole numbers.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {manifest['format_version']!r}, this version reads {FORMAT_VERSION}. "
            "Use the version of moshi-ttt that wrote it."
        )
    return manifest


def _parse_site(entry: Mapping[str, Any], registry: Registry) -> BlockConfig:
    """The config of one site of the manifest; a variant that is not installed is named with its distribution."""
    try:
        values = {**entry["config"], "layers": (Site.parse(entry["site"]).layer,)}
        return parse_block({**values, "variant": _variant(entry, registry)}, registry=registry)
    except (ConfigError, PluginError) as error:
        raise AdapterError(
            f"{error} The adapter was made with {entry['distribution']} {entry['version']} "
            f"(plugin {entry['plugin']!r}): install that."
        ) from error


def _variant(entry: Mapping[str, Any], registry: Registry) -> str:
    """The name of a site's variant; where two distributions share it, that of the one which made the adapter."""
    return _qualified(str(entry["config"]["variant"]), str(entry["distribution"]), registry)


def _qualified(name: str, distribution: str, registry: Registry) -> str:
    return name if len(registry.claims("block", name)) < 2 else f"{distribution}:{name}"


def _check_replaceable(folder: Path) -> None:
    """Raise AdapterError unless ``folder`` is free, or holds an adapter and nothing else."""
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise AdapterError(f"{folder} exists and is not an adapter; choose another folder.")
    others = (
        sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST, TENSORS))
        if folder.exists()
        else []
    )
    if others:
        raise AdapterError(
            f"{folder} holds more than an adapter ({', '.join(others[:5])}), which saving would delete. "
            "Choose another folder, or move those files."
        )


def _describe(planned: PlannedBlock) -> dict[str, Any]:
    provenance = planned.variant.provenance
    return {
        "site": str(planned.site),
        "plugin": provenance.plugin,
        "distribution": provenance.distribution,
        "version": provenance.version,
        "config": planned.config.model_dump(mode="json", exclude={"layers", "distribution"}),
    }


def _own_tensors(injection: Injection) -> dict[str, Tensor]:
    """What an adapter holds of the blocks: parameters, which may be sharded, and persistent buffers."""
    try:
        return {**dict(injection.named_parameters()), **dict(injection.named_buffers())}
    except ConfigError as error:
        raise AdapterError(f"{error} Nothing was saved.") from error


def _check_provenance(folder: Path, sites: Iterable[Mapping[str, Any]], registry: Registry) -> None:
    """Raise AdapterError where a variant of the name is installed, and is not what the adapter was trained with.

    A variant registered at run time is what the caller says it is: it is accepted with a warning.
    """
    for entry in sites:
        name, here = entry["config"]["variant"], registry.block(_variant(entry, registry)).provenance
        made = Provenance(entry["plugin"], entry["distribution"], entry["version"])
        if RUNTIME.distribution in (made.distribution, here.distribution):
            if made.distribution != here.distribution:
                warnings.warn(
                    f"{folder}: {entry['site']} was trained with {name!r} of {made}, and here it is of {here}. It is "
                    "taken for the same.",
                    stacklevel=3,
                )
        elif made.distribution != here.distribution:
            raise AdapterError(
                f"{folder}: {entry['site']} was trained with {name!r} of {made}, and the {name!r} that is installed is "
                f"of {here}, another distribution. Install {made.distribution}, and uninstall {here.distribution} or "
                "leave it out by MOSHI_TTT_PLUGINS. The model was not touched."
            )
        elif major_version(made.version) != major_version(here.version):
            raise AdapterError(
                f"{folder}: {entry['site']} was trained with {name!r} of {made}, and version {here.version} is "
                f"installed: another major version may compute something else. Install "
                f"{made.distribution}=={major_version(made.version)}.*. The model was not touched."
            )


def major_version(version: str) -> str:
    """The first part of a version: a change in it may change what a block computes."""
    return str(version).lstrip("v").partition(".")[0]


def _check_fingerprint(folder: Path, saved: Mapping[str, Any], host: HostModel, model: nn.Module) -> None:
    if saved in host.earlier_fingerprints(model):
        return
    actual = host.fingerprint(model)
    different = {
        key: (saved.get(key), actual.get(key))
        for key in sorted({*saved, *actual})
        if saved.get(key) != actual.get(key) and not (key == "weights" and None in (saved.get(key), actual.get(key)))
    }
    if different:
        facts = "; ".join(f"{key}: adapter {a!r}, model {b!r}" for key, (a, b) in different.items())
        if different.keys() == {"weights"}:
            raise AdapterError(
                f"{folder} was made for another base model: {facts}. The architecture is the same. Load the weights "
                "that it was trained on: where its training merged what it learned into the base model (a LoRA with "
                "save_adapters: false, or full_finetuning), those are the merged ones, in consolidated/ of the same "
                "checkpoint."
            )
        raise AdapterError(f"{folder} was made for another base model: {facts}. Load the model it was trained on.")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing. The adapter is incomplete; save it again.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. The file is truncated or damaged; save it again."
        ) from None


def _check_tensors(folder: Path, plan: Plan, extra: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    expected: dict[str, Tensor] = {EXTRA + name: parameter for name, parameter in extra.items()}
    for planned in plan.blocks:
        expected |= {f"{planned.site}.{name}": tensor for name, tensor in planned.tensors().items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        want, have = expected[name], tensors[name]
        if want.shape != have.shape or (want.dtype != have.dtype and not name.startswith(EXTRA)):
            problems.append(
                f"{name}: expected {list(want.shape)} {want.dtype}, the file has {list(have.shape)} {have.dtype}"
            )
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        hint = ""
        if any(name.startswith(EXTRA) for name in expected.keys() ^ tensors.keys()):
            hint = f" The LoRA in {MANIFEST} does not match the LoRA tensors in {TENSORS}."
        raise AdapterError(f"{folder}: {shown}. The adapter was not loaded.{hint}")
