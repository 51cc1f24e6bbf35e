"""The differences between operating systems. Each function works, or raises an error that says why it cannot."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from moshi_ttt.core.errors import ConfigError

FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}


def peak_memory() -> int | None:
    """The most bytes that this process has held in memory; None on Windows, which Python cannot ask."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # macOS counts bytes, Linux kilobytes


def check_workers(num_workers: int) -> None:
    """Raise ConfigError when data workers are asked for where a process cannot be forked."""
    import multiprocessing

    if num_workers and "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            f"data.num_workers is {num_workers}, and workers are forked, which {_name()} cannot do. Set it to 0, or "
            "encode the recordings once with `moshi-ttt encode`."
        )


def check_file_names(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that cannot be a folder's on every system, or two that are one folder's on some.

    Windows refuses some signs, and neither it nor macOS tells capital letters from small ones.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not name or FORBIDDEN.search(name) or name.rstrip(". ") != name or name.split(".")[0].upper() in RESERVED:
            raise ConfigError(
                f'{name!r} is to name a folder, and not every system allows that. Leave out < > : " / \\ | ? *, and a '
                "point or blank at the end."
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise ConfigError(f"{other!r} and {name!r} are to name two folders, which are one on Windows and macOS.")


def check_training(device: str) -> None:
    """Raise ConfigError when this installation of torch cannot train on ``device`` (``cpu`` or ``cuda``)."""
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigError(
            f"Training uses torch.distributed, and this PyTorch for {_name()} was built without it. Install the "
            "PyTorch of PyPI."
        )
    if device == "cuda" and not dist.is_nccl_available():
        raise ConfigError(
            f"Training on CUDA needs NCCL, and this PyTorch for {_name()} has none. Train on Linux (on Windows, in "
            "WSL 2), or set device: cpu."
        )


def _name() -> str:
    return {"win32": "Windows", "darwin": "macOS", "linux": "Linux"}.get(sys.platform, sys.platform)
