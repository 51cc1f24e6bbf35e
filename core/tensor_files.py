"""Reading a whole safetensors file with its metadata, and a checksum that tells a damaged one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

CHECKSUM = "sha256"
"""The name of the checksum in a file's metadata."""


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the file by name, on the CPU, and its metadata. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def with_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata``, and a checksum (SHA-256) of it and of ``tensors``, which are on the CPU."""
    return {**metadata, CHECKSUM: _checksum(tensors, metadata)}


def is_damaged(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the checksum in ``metadata`` is another one than that of what was read.

    False where there is no checksum: earlier versions wrote none.
    """
    if CHECKSUM not in metadata:
        return False
    rest = {name: value for name, value in metadata.items() if name != CHECKSUM}
    return metadata[CHECKSUM] != _checksum(tensors, rest)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(metadata.items()):
        sha.update(f"{name!r}: {value!r}\n".encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name!r}: {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # any shape -> [bytes]
    return sha.hexdigest()
