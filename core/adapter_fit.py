"""Whether an adapter fits: the installed variants, the base model, and the names, shapes and dtypes of the tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moshi_ttt.core.adapter_folder import EXTRA, MANIFEST, TENSORS
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.errors import AdapterError, ConfigError, PluginError
from moshi_ttt.core.host import HostModel
from moshi_ttt.core.planning import PlannedBlock
from moshi_ttt.core.registrar import RUNTIME, Provenance
from moshi_ttt.core.registry import Registry
from moshi_ttt.core.site import Site


def parse_site(entry: Mapping[str, Any], registry: Registry) -> BlockConfig:
    """The config of one site of the manifest; a variant that is not installed is named with its distribution."""
    try:
        values = {**entry["config"], "layers": (Site.parse(entry["site"]).layer,)}
        return parse_block({**values, "variant": variant_name(entry, registry)}, registry=registry)
    except (ConfigError, PluginError) as error:
        raise AdapterError(
            f"{error} The adapter was made with {entry['distribution']} {entry['version']} "
            f"(plugin {entry['plugin']!r}): install that."
        ) from error


def variant_name(entry: Mapping[str, Any], registry: Registry) -> str:
    """The name of a site's variant; where two distributions share it, that of the one which made the adapter."""
    return qualified(str(entry["config"]["variant"]), str(entry["distribution"]), registry)


def qualified(name: str, distribution: str, registry: Registry) -> str:
    """A variant's name, with its distribution where several distributions have a variant of that name."""
    return name if len(registry.claims("block", name)) < 2 else f"{distribution}:{name}"


def check_provenance(folder: Path, sites: Iterable[Mapping[str, Any]], registry: Registry) -> None:
    """Raise AdapterError where a variant of the name is installed, and is not what the adapter was trained with.

    A variant registered at run time is what the caller says it is: it is accepted with a warning.
    """
    for entry in sites:
        name, here = entry["config"]["variant"], registry.block(variant_name(entry, registry)).provenance
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


def check_fingerprint(folder: Path, saved: Mapping[str, Any], host: HostModel, model: nn.Module) -> None:
    """Raise AdapterError where two fingerprints differ; weights are compared where both have their digest.

    A fingerprint that an earlier version of the host wrote of the same model is accepted.
    """
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


def check_tensors(
    folder: Path, blocks: Iterable[PlannedBlock], extra: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Raise AdapterError unless ``tensors`` are those of the blocks and of ``extra``, by name, shape and dtype.

    A tensor of ``extra`` may have another dtype: it is filled in the model's.
    """
    expected: dict[str, Tensor] = {EXTRA + name: parameter for name, parameter in extra.items()}
    for planned in blocks:
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
