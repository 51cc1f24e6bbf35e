"""Reading a whole safetensors file, with its metadata."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the file by name, on the CPU, and its metadata. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
