"""The backends of the TTT layer's inner loop: of a call of any length (``TRAIN``) and of a streamed step (``STEP``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.precision import MatmulPrecision
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.backends import Backend, Operation
from moshi_ttt.plugins.common.native import NativeLibrary
from moshi_ttt.plugins.hybrid import compiled
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.cpp import chunk as cpp
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.naive_call import naive_call, naive_step
from moshi_ttt.plugins.hybrid.objective import Objective
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop
from moshi_ttt.plugins.hybrid.triton import backend as kernels
from moshi_ttt.plugins.hybrid.triton import step, train, trial
from moshi_ttt.plugins.hybrid.triton.train_settings import Products

if TYPE_CHECKING:
    from moshi_ttt.plugins.hybrid.with_backends import HybridWithBackends

LEAST_WIDTH = 128
"""Of a head, for C++ under ``auto``, where it is not prebuilt: that of Moshi 7B. With narrower heads, a build takes
longer than it saves."""


@dataclass(frozen=True)
class HybridUse:
    """What decides which backend can serve a block.

    Attributes:
        config: its options.
        widths: of its fast network's layers, input and output (the head width) included.
        device: of the activations and the state.
        dtype: of the state.
        matmul_precision: of products of float32 matrices, as the precision policy has it.
        layer: the class of the block, which ``auto`` tries kernels with.
        model: the dtype of the host's activations.
    """

    config: HybridConfig
    widths: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    matmul_precision: MatmulPrecision = "highest"
    layer: type[HybridWithBackends] | None = None
    model: torch.dtype = torch.float32


class TrainRun(Protocol):
    """The inner loop over a whole call, as ``chunk_inner_loop``."""

    def __call__(
        self, tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor, *, layout: ChunkLayout,
        causal: bool, checkpoint_chunks: int | None, rule: UpdateRule | None, updated: Tensor | None,
    ) -> tuple[Tensor, BlockState]: ...  # fmt: skip


class StepRun(Protocol):
    """The inner loop of one token, in place, as ``recurrent_inner_loop``."""

    def __call__(
        self, tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor,
        exec_mask: Tensor | None, rule: UpdateRule | None, updated: Tensor | None,
    ) -> Tensor: ...  # fmt: skip


def unpublished(config: HybridConfig) -> str | None:
    """The options that are not of the published inner loop, as in ``momentum: 0.9``; None where there are none.

    ``causal`` and the options around the inner loop are not among them.
    """
    options = {"inner_norm": config.inner_norm is not True, "inner_steps": config.inner_steps != 1}
    options["learned_momentum" if config.learned_momentum else "momentum"] = config.start_momentum > 0
    changed = [f"{name}: {getattr(config, name)}" for name, differs in options.items() if differs]
    return ", ".join(changed) or None


def _not_naive(use: HybridUse) -> str | None:
    if (changed := unpublished(use.config)) is not None:
        return f"it has {changed}; the naive backend is for the published form of these options"
    return None


def _not_kernels(
    use: HybridUse, what: str, not_these_shapes: Callable[[tuple[int, ...], int], str | None]
) -> str | None:
    """Why Triton's kernels, which are called ``what``, cannot serve a use; None where they can."""
    if (reason := kernels.not_here(use.device)) is not None:
        return reason
    if use.dtype not in kernels.STATES:
        return f"its state is {use.dtype}; {what} are for {' and '.join(str(dtype)[6:] for dtype in kernels.STATES)}"
    if (changed := unpublished(use.config)) is not None:
        return f"it has {changed}; the kernels are for the published form of these options"
    return not_these_shapes(use.widths, use.config.chunk)


def _not_triton(use: HybridUse) -> str | None:
    return _not_kernels(use, "the kernels", kernels.not_these_shapes)


def _no_triton_step(use: HybridUse) -> str | None:
    return _not_kernels(use, "the kernels of a step", step.not_these_shapes)


def _products(use: HybridUse) -> Products:
    return kernels.products_of(use.device, use.matmul_precision, use.dtype)


def _not_by_auto(reason: str) -> str:
    return f"{reason}; ask for it by name"


def _not_torch_compile(use: HybridUse) -> str | None:
    if use.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on a CPU, g++ or the one that CXX names, and there is none here"
    if use.device.type not in ("cpu", "cuda"):
        return f"its device is {use.device}; torch.compile serves CPUs and CUDA here"
    return None


def _not_cpp(use: HybridUse) -> str | None:
    if use.device.type != "cpu" or use.dtype not in cpp.DTYPES:
        return f"its state is {use.dtype} on {use.device}; the C++ is for float32 and float64 on a CPU"
    if (changed := unpublished(use.config)) is not None:
        return f"it has {changed}; the C++ is for the published form of these options"
    return cpp.LIBRARY.why_not()


def _too_small_for_cpp(use: HybridUse, library: NativeLibrary) -> str | None:
    """A build takes longer than a small model's whole training. What is prebuilt serves every width."""
    if use.widths[0] < LEAST_WIDTH and library.prebuilt() is None:
        return _not_by_auto(f"its heads are {use.widths[0]} wide, and C++ is built for heads of {LEAST_WIDTH} or more")
    return None


def _compiled_chunks(use: HybridUse) -> TrainRun:
    run: TrainRun = torch.compile(chunk_inner_loop, dynamic=False)
    return run


TRAIN: Operation[HybridUse, TrainRun] = Operation(
    "train",
    "a training call",
    (
        Backend(
            name="triton",
            why_not=_not_triton,
            why_not_auto=lambda use: (
                kernels.not_by_auto(use.device, use.widths, use.config.chunk, _products(use))
                or trial.not_agreed(use, "train")
            ),
            load=lambda use: train.load(use.device, _products(use), use.config.backends().tune),
        ),
        Backend(
            name="cpp",
            why_not=_not_cpp,
            why_not_auto=lambda use: _too_small_for_cpp(use, cpp.LIBRARY),
            load=cpp.load,
        ),
        Backend(name="torch", load=lambda use: chunk_inner_loop),
        Backend(
            name="compile",
            why_not=_not_torch_compile,
            why_not_auto=lambda use: _not_by_auto("it is compiled at first use and for each length, for minutes"),
            load=_compiled_chunks,
        ),
        Backend(
            name="naive",
            why_not=_not_naive,
            why_not_auto=lambda use: _not_by_auto("it is slow"),
            load=lambda use: naive_call,
        ),
    ),
)
STEP: Operation[HybridUse, StepRun] = Operation(
    "step",
    "a streamed step",
    (
        Backend(
            name="triton",
            why_not=_no_triton_step,
            why_not_auto=lambda use: (
                step.not_by_auto(use.device, use.widths, use.config.chunk, use.dtype) or trial.not_agreed(use, "step")
            ),
            load=lambda use: step.load(use.device),
        ),
        Backend(
            name="cpp",
            why_not=lambda use: compiled.why_not(use.config, use.device, use.dtype) or compiled.LIBRARY.why_not(),
            why_not_auto=lambda use: _too_small_for_cpp(use, compiled.LIBRARY),
            load=compiled.load,
        ),
        Backend(name="torch", load=lambda use: recurrent_inner_loop),
        Backend(
            name="naive",
            why_not=_not_naive,
            why_not_auto=lambda use: _not_by_auto("it is slow"),
            load=lambda use: naive_step,
        ),
    ),
)
