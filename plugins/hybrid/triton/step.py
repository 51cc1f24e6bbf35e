"""A streamed step by Triton kernels: of the whole layer, or of its inner loop alone. The results of recurrent.py.

``step_kernels`` has the inner loop, ``step_surroundings`` what is around it. Triton is not imported until a step is
made: ``why_not`` says whether one can be.

Shape legend: B streams, H heads, C tokens a chunk, D head width.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moshi_ttt.core.errors import ContextError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.inner_loop import COUNTERS, Tokens, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.triton.step_operations import operations

if TYPE_CHECKING:
    from moshi_ttt.core.block import BlockContext
    from moshi_ttt.plugins.hybrid.block import HybridBlock

WIDEST_HEAD = 256
WIDEST_LAYER = 4096
MOST_CHANNELS = 16384
LONGEST_CHUNK = 1024


def why_not(config: HybridConfig, device: torch.device, roles: DtypeRoles, widths: tuple[int, ...]) -> str | None:
    """Why a layer has no step by Triton kernels, as the end of a sentence; None where it has one.

    Args:
        widths: of the fast network's layers, its input included.
    """
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with torch for CUDA"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it is on the CPU; Triton's kernels are for CUDA (on a CPU, for tests, with TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"it is on {device}; Triton's kernels are for CUDA"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what the kernels are compiled for, sm_80"
    wide = {name: getattr(roles, name) for name in ("state", "compute", "rope", "output")}
    if other := [f"{name} {dtype}" for name, dtype in wide.items() if dtype != torch.float32]:
        return f"policy {roles.policy!r} computes in {', '.join(other)}; the kernels compute in float32"
    options = {"inner_norm": config.inner_norm is not True, "inner_steps": config.inner_steps != 1}
    options |= {"momentum": config.start_momentum > 0, "causal": not config.causal}
    if changed := [f"{name}: {getattr(config, name)}" for name, differs in options.items() if differs]:
        return f"it has {', '.join(changed)}; the kernels are for the published form of these options"
    if widths[0] > WIDEST_HEAD or max(widths) > WIDEST_LAYER:
        return (
            f"its fast network has widths {', '.join(map(str, widths))}; the kernels take heads up to {WIDEST_HEAD} and "
            f"hidden layers up to {WIDEST_LAYER}"
        )
    if config.chunk > LONGEST_CHUNK:
        return f"its chunk is {config.chunk}; the kernels take chunks up to {LONGEST_CHUNK}"
    return None


def triton_inner_loop(
    tokens: Tokens,
    state: BlockState,
    norm: InnerNorm,
    token_scale: Tensor,
    exec_mask: Tensor | None = None,
    updated: Tensor | None = None,
) -> Tensor:
    """As ``recurrent_inner_loop``: ``y [B, 1, H * D]``, with zeros in rows where ``exec_mask`` is false."""
    q, k, v, lr = (part.float().contiguous() for part in tokens)
    run, limit = operations(), largest_factor(torch.float32)
    check_parts(state, q, token_scale.shape[0])
    ok, now = run.look(q, k, v, lr, exec_mask, state["position"], state["spoiled"], token_scale.shape[0], limit)
    return _inner((q, k, v, lr), (ok, now, token_scale.float().contiguous()), state, norm, exec_mask, updated)


def _inner(
    tokens: tuple[Tensor, ...], found: tuple[Tensor, ...], state: BlockState, norm: InnerNorm,
    exec_mask: Tensor | None, updated: Tensor | None,
) -> Tensor:  # fmt: skip
    fast, memory = unpack(state)
    y: Tensor = operations().inner(
        *tokens, *found, state["position"], state["spoiled"], state["skipped"], list(fast.weights), list(fast.biases),
        list(memory.inputs), list(memory.gradients), norm.weight, norm.bias, exec_mask, updated, norm.eps,
    )  # fmt: skip
    return y


def triton_step(
    block: HybridBlock, x: Tensor, value: Tensor, given: Tensor | None, state: BlockState, context: BlockContext
) -> Tensor:
    """The step of a block without a short convolution: the output ``[B, 1, H D]``; the state is changed in place.

    Four products of torch's, and, around those kernels that ``step_kernels`` lists, ``prepare``, ``norm`` and ``gate``.

    Args:
        x: one token of every stream, ``[B, 1, H D]``.
        value: what values are projected from, ``[B, 1, H D]``.
        given: ``[B, 1]`` bool, tokens that may enter; None where that depends on ``x`` alone.
    """
    roles, config, run = block.roles, block.config, operations()
    q, k, v = (
        projection.inputs(context, roles.matmul)(part, roles.matmul)
        for projection, part in ((block.wq, x), (block.wk, x), (block.wv, value))
    )
    active, updated = context.exec_mask, context.updates_mask(x)
    limit, theta = largest_factor(torch.float32), config.rope_theta
    *tokens, ok, now, scale = run.prepare(
        x, q, k, v, given, updated, active, state["position"], state["spoiled"], block.lr_weight, block.lr_bias,
        block.norm_weight, block.norm_bias, block.token_scale_offset, config.base_lr / block.norm_weight.shape[1],
        float(block.inner_lr_factor), theta, max(config.target_eps, torch.finfo(torch.float32).tiny), limit,
    )  # fmt: skip
    check_parts(state, tokens[0], config.chunk)
    norm = InnerNorm(block.norm_weight, block.norm_bias, config.norm_eps)
    y = _inner(tuple(tokens), (ok, now, scale), state, norm, active, updated)
    normal = run.norm(y, block.post_norm.weight, block.post_norm.bias, config.post_norm_eps, roles.matmul)
    added = block.wo.inputs(context, roles.matmul)(normal, roles.matmul)
    volume = block.volume_in(context)
    rows, number = (volume.to(roles.output), 1.0) if isinstance(volume, Tensor) else (None, float(volume))
    out: Tensor = run.gate(x, added, block.gate, rows, number)
    return out


def check_parts(state: BlockState, q: Tensor, chunk: int) -> None:
    """Raise ContextError where a part of ``state`` has not the shape that a kernel would write to.

    Args:
        q: ``[B, 1, H, D]``.
        chunk: C.
    """
    batch, _, heads, width = q.shape
    fast, _ = unpack(state)
    head_width = width
    expected: dict[str, tuple[int, ...]] = {name: (batch,) for name in COUNTERS}
    for i, weight in enumerate(fast.weights):
        out = head_width if i + 1 == len(fast.weights) else weight.shape[3]
        expected[f"weight.{i}"], expected[f"bias.{i}"] = (batch, heads, width, out), (batch, heads, 1, out)
        expected[f"input.{i}"], expected[f"gradient.{i}"] = (batch, heads, chunk, width), (batch, heads, chunk, out)
        width = out
    for name, shape in expected.items():
        if state[name].shape != shape or not state[name].is_contiguous():
            raise ContextError(
                f"The state's {name!r} has shape {tuple(state[name].shape)}"
                f"{'' if state[name].is_contiguous() else ', not contiguous'}, and this block's is {shape}. Take the "
                "state from the block's allocate_state."
            )
