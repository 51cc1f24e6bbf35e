"""The option ``deterministic``: equal results in every run on CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moshi_ttt.core.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""The values with which cuBLAS adds in one order; it reads them when CUDA starts."""


@contextmanager
def deterministic(wanted: bool, device: str) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only, and an operation that has none raises RuntimeError.

    Every switch is as it was afterwards. Enter before CUDA starts.

    Args:
        wanted: False changes nothing.
        device: what the run computes on, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: cuBLAS has a workspace with which it is not deterministic, or CUDA has started without one.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.get(WORKSPACE)
    if device == "cuda":
        _check_workspace(workspace)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        if device == "cuda":
            os.environ[WORKSPACE] = workspace or FIXED[0]
        torch.backends.cudnn.benchmark = False  # it may choose another algorithm each time
        torch.use_deterministic_algorithms(True, warn_only=False)  # with True, attention's backward stays as it was
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def _check_workspace(workspace: str | None) -> None:
    if workspace is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"deterministic is true, and CUDA has started in this process without {WORKSPACE}. Set "
            f"{WORKSPACE}={FIXED[0]} in the environment before the process starts."
        )
    if workspace not in (None, *FIXED):
        raise ConfigError(
            f"deterministic is true, and {WORKSPACE} is {workspace!r}. Set it to {' or '.join(FIXED)}, or leave it out."
        )
