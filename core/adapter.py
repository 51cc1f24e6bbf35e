"""Adapter checkpoints: what training saves. A folder of ``adapter.safetensors`` and ``adapter.json``.

The tensors have exact dtypes. The JSON says what they belong to: format version, each site's variant, plugin,
distribution, version and config, the host's fingerprint, the precision policy, the training step. Loading is strict
both ways and checks everything before the model is touched. Saving is atomic: the folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.block import Site
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import AdapterError, ConfigError, MoshiTTTError, PluginError
from moshi_ttt.core.injection import Injection, Plan, PlannedBlock, make_plan
from moshi_ttt.core.registry import Registry, default_registry

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
MANIFEST = "adapter.json"


def save_adapter(injection: Injection, folder: str | Path, *, training_step: int = 0) -> Path:
    """Write the blocks' parameters to ``folder``, replacing an adapter that is there.

    Written to a temporary folder beside it, synced, then renamed: a reader sees the old adapter or the new one.
    Raises AdapterError when ``folder`` exists and is not an adapter.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise AdapterError(f"{folder} exists and is not an adapter; choose another folder.")
    tensors = {name: _whole(parameter) for name, parameter in injection.named_parameters()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "host": injection.host.name,
        "fingerprint": injection.host.fingerprint(injection.model),
        "precision": injection.plan.policy.name,
        "training_step": training_step,
        "sites": [_describe(planned) for planned in injection.plan.blocks],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, registry: Registry | None = None) -> Injection:
    """Inject the blocks of an adapter into its base model and fill them; bit-equal to what was saved.

    Raises:
        AdapterError: the folder is not an adapter, is damaged or incomplete, belongs to another host or model, or needs
            a plugin that is not installed. The model is untouched.
    """
    registry = registry or default_registry()
    folder = Path(folder)
    manifest = read_manifest(folder)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise AdapterError(f"{folder}: the model is on the meta device and cannot hold values; load its weights first.")
    try:
        host = registry.host(str(manifest["host"]))
        _check_fingerprint(folder, manifest["fingerprint"], host.fingerprint(model))
        entries = [_parse_site(entry, registry) for entry in manifest["sites"]]
        policy = registry.policy(manifest["precision"])
        plan = make_plan(model, host, entries, policy=policy, registry=registry)
    except AdapterError:
        raise
    except (MoshiTTTError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder}: it does not fit this model or installation. {error}") from error
    tensors = _read_tensors(folder / TENSORS)
    _check_tensors(folder, plan, tensors)
    injection = plan.apply(model)
    with torch.no_grad():
        for name, parameter in injection.named_parameters():
            parameter.copy_(tensors[name])
    injection.check_precision("load")
    return injection


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of ``adapter.json``, checked for completeness. Raises AdapterError."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder} is not an adapter: it has no {MANIFEST}.") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}. The adapter is damaged; save it again.") from None
    needed = {"format_version", "host", "fingerprint", "precision", "training_step", "sites"}
    if not isinstance(manifest, dict) or not needed <= manifest.keys():
        raise AdapterError(f"{path} is incomplete: it needs {sorted(needed)}. The adapter is damaged; save it again.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {manifest['format_version']!r}, this version reads {FORMAT_VERSION}. "
            "Use the version of moshi-ttt that wrote it."
        )
    return manifest


def _parse_site(entry: Mapping[str, Any], registry: Registry) -> BlockConfig:
    """The config of one site of the manifest; a variant that is not installed is named with its distribution."""
    try:
        return parse_block({**entry["config"], "layers": (Site.parse(entry["site"]).layer,)}, registry=registry)
    except (ConfigError, PluginError) as error:
        raise AdapterError(
            f"{error} The adapter was made with {entry['distribution']} {entry['version']} "
            f"(plugin {entry['plugin']!r}): install that."
        ) from error


def _describe(planned: PlannedBlock) -> dict[str, Any]:
    provenance = planned.variant.provenance
    return {
        "site": str(planned.site),
        "plugin": provenance.plugin,
        "distribution": provenance.distribution,
        "version": provenance.version,
        "config": planned.config.model_dump(mode="json", exclude={"layers"}),
    }


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().cpu().contiguous().clone()


def _check_fingerprint(folder: Path, saved: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    different = {
        key: (saved.get(key), actual.get(key))
        for key in sorted({*saved, *actual})
        if saved.get(key) != actual.get(key) and not (key == "weights" and None in (saved.get(key), actual.get(key)))
    }
    if different:
        facts = "; ".join(f"{key}: adapter {a!r}, model {b!r}" for key, (a, b) in different.items())
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


def _check_tensors(folder: Path, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    expected: dict[str, Tensor] = {}
    for planned in plan.blocks:
        trial = planned.variant.factory(planned.config, planned.info.on(torch.device("meta")), planned.roles)
        expected |= {f"{planned.site}.{name}": parameter for name, parameter in trial.named_parameters()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        want, have = expected[name], tensors[name]
        if want.shape != have.shape or want.dtype != have.dtype:
            problems.append(
                f"{name}: expected {list(want.shape)} {want.dtype}, the file has {list(have.shape)} {have.dtype}"
            )
    if problems:
        raise AdapterError(f"{folder}: {'; '.join(problems)}. The adapter was not loaded.")
