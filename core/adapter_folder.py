"""What an adapter is on disk: a folder of ``adapter.safetensors`` and ``adapter.json``, and nothing else.

The tensors have exact dtypes. The JSON says what they belong to: format version, each site's variant, plugin,
distribution, version and config, the host's fingerprint, the precision policy, the training step. Writing is atomic:
the folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.core import tensor_files
from moshi_ttt.core.atomic import atomic_folder
from moshi_ttt.core.errors import AdapterError
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.site import Site

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
        check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            save_file(dict(self.tensors), temporary / TENSORS)
            (temporary / MANIFEST).write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")
        return folder


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


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The contents of ``adapter.json``, checked for completeness. Raises AdapterError."""
    path = user_path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.exists():
            raise AdapterError(f"There is no folder {path.parent}. Give the folder that save_adapter wrote.") from None
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter.safetensors``, on the CPU. Raises AdapterError."""
    try:
        return tensor_files.read_tensors(path)[0]
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing. The adapter is incomplete; save it again.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. The file is truncated or damaged; save it again."
        ) from None


def check_replaceable(folder: Path) -> None:
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
