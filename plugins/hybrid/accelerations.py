"""The faster forms of the hybrid layer on this machine, for ``moshi-ttt info``."""

from __future__ import annotations

import importlib.util

import torch

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.plugins.common.native import compiled_step
from moshi_ttt.plugins.hybrid.compiled import LIBRARY


def multilayer() -> tuple[Acceleration, ...]:
    """The faster forms of ttt_multilayer."""
    return (compiled_step(LIBRARY),)


def trained_by_kernels() -> tuple[Acceleration, ...]:
    """The faster forms of ttt_linear and ttt_mlp."""
    purpose = "Training on CUDA; called from Python alone, because no block uses them yet."
    return (*multilayer(), Acceleration(name="Triton kernels", purpose=purpose, missing=triton_missing()))


def triton_missing() -> str:
    """Why this machine cannot run the Triton kernels, as a sentence; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. PyTorch for CUDA installs it on Linux."
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device."
    return ""
