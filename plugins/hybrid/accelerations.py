"""The faster forms of the hybrid layer on this machine, for ``moshi-ttt info``."""

from __future__ import annotations

import torch

from moshi_ttt.core.accelerations import Acceleration
from moshi_ttt.plugins.common.native import compiled_step
from moshi_ttt.plugins.hybrid import compiled
from moshi_ttt.plugins.hybrid.cpp.chunk import LIBRARY as INNER_LOOP
from moshi_ttt.plugins.hybrid.triton.backend import not_here


def multilayer() -> tuple[Acceleration, ...]:
    """The faster forms of ttt_multilayer."""
    inner_loop = "A training call on a CPU, in float32 and float64; chosen by backend.train."
    return (
        compiled_step(compiled.LIBRARY, "backend.step"),
        Acceleration(
            name="compiled training", purpose=inner_loop, missing=INNER_LOOP.missing(), origin=INNER_LOOP.origin()
        ),
        Acceleration(
            name="Triton step", purpose="A streamed step on an NVIDIA GPU; chosen by backend.step.", missing=no_triton()
        ),
    )


def trained_by_kernels() -> tuple[Acceleration, ...]:
    """The faster forms of ttt_linear and ttt_mlp."""
    purpose = "A training call on an NVIDIA GPU; chosen by backend.train."
    return (*multilayer(), Acceleration(name="Triton training", purpose=purpose, missing=no_triton()))


def no_triton() -> str:
    """Why this machine cannot run the Triton kernels, as a sentence; empty where it can."""
    reason = not_here(torch.device("cuda"))
    return "" if reason is None else f"{reason[0].upper()}{reason[1:]}."
