"""The compiled step: step.cpp, built on the machine that streams. The same results as recurrent.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.native import NativeLibrary, common_headers
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.cpp import PARTS
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective

LIBRARY = NativeLibrary(
    name="moshi_ttt_hybrid",
    what="The compiled step of the hybrid layer",
    source=Path(__file__).with_name("step.cpp"),
    headers=(
        *(Path(__file__).parent / "cpp" / f"{name}.h" for name in (*PARTS, "step_head")),
        *common_headers("parallel", "vectors"),
    ),
    flags=("-march=native", "-ffp-contract=fast"),
    otherwise="With backend: {step: torch} the same results come from tensor operations.",
)
DTYPES = (torch.float32, torch.float64)


def why_not(config: HybridConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a layer has no compiled step, as the end of a sentence; None where it has one."""
    if device.type != "cpu" or dtype not in DTYPES:
        return f"its state is {dtype} on {device}; the compiled step is for float32 and float64 on a CPU"
    options = {"inner_norm": config.inner_norm is not True, "inner_steps": config.inner_steps != 1}
    options |= {"momentum": config.start_momentum > 0, "causal": not config.causal}
    changed = [f"{name}: {getattr(config, name)}" for name, differs in options.items() if differs]
    if changed:
        return f"it has {', '.join(changed)}; the compiled step is for the published form of these options"
    return None


def load(use: object) -> Callable[..., Tensor]:
    """``compiled_inner_loop``, built. Raises BackendError where it cannot be built."""
    operation()
    return compiled_inner_loop


@functools.cache
def operation() -> Any:
    """step.cpp as an operation of torch's. Raises BackendError where it cannot be built."""
    LIBRARY.load()
    torch.library.register_fake(f"{LIBRARY.name}::step", _shape)
    return getattr(torch.ops, LIBRARY.name).step.default


def compiled_inner_loop(
    tokens: Tokens,
    state: BlockState,
    norm: Objective,
    token_scale: Tensor,
    exec_mask: Tensor | None = None,
    rule: UpdateRule | None = None,
    updated: Tensor | None = None,
) -> Tensor:
    """As ``recurrent_inner_loop``: ``y [B, 1, H * D]``, with zeros in rows where ``exec_mask`` is false."""
    assert isinstance(norm, InnerNorm)
    fast, memory = unpack(state)
    dtype = fast.weights[0].dtype
    q, k, v, lr = (part.to(dtype) for part in tokens)
    y: Tensor = operation()(
        q, k, v, lr, state["position"], state["spoiled"], state["skipped"], list(fast.weights), list(fast.biases),
        list(memory.inputs), list(memory.gradients), norm.weight, norm.bias, token_scale, exec_mask, updated, norm.eps,
        largest_factor(dtype),
    )  # fmt: skip
    return y


def _shape(q: Tensor, *others: Any, **named: Any) -> Tensor:
    """A tensor like the result, for tensors without values."""
    return q.flatten(2).new_empty(q.shape[0], 1, q.shape[2] * q.shape[3])
