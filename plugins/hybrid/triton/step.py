"""A streamed step by Triton kernels: of the whole layer, or of its inner loop alone. The results of recurrent.py.

``step_kernels`` has the inner loop, ``step_surroundings`` what is around it. Triton is not imported until a step is
made; ``hybrid.backends`` says where one can be.

Shape legend: B streams, H heads, C tokens a chunk, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moshi_ttt.core.errors import BackendError, ContextError
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import COUNTERS, Tokens, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective
from moshi_ttt.plugins.hybrid.triton.backend import COMPUTED, by_name_alone
from moshi_ttt.plugins.hybrid.triton.resources import step_too_large
from moshi_ttt.plugins.hybrid.triton.step_operations import operations

if TYPE_CHECKING:
    from moshi_ttt.core.block import BlockContext
    from moshi_ttt.plugins.hybrid.block import HybridBlock

WIDEST_HEAD = 256
WIDEST_LAYER = 4096
LONGEST_CHUNK = 1024
MOST_CHANNELS = 16384
AUTO_CHUNKS, AUTO_HEAD_WIDTHS, AUTO_EXPANSION = (16, 32), (64, 128), 4
"""What ``auto`` takes the kernels for, as far as the record of their resources allows it."""


def not_these_shapes(widths: tuple[int, ...], chunk: int) -> str | None:
    """Why the kernels do not take a fast network of these layer widths or such a chunk; None where they do."""
    if widths[0] > WIDEST_HEAD or max(widths) > WIDEST_LAYER:
        return (
            f"its fast network has widths {', '.join(map(str, widths))}; the kernels take heads up to {WIDEST_HEAD} "
            f"and hidden layers up to {WIDEST_LAYER}"
        )
    if chunk > LONGEST_CHUNK:
        return f"chunk: {chunk}; the kernels take chunks up to {LONGEST_CHUNK}"
    return None


def not_by_auto(device: torch.device, widths: tuple[int, ...], chunk: int, state: torch.dtype) -> str | None:
    """Why ``auto`` takes another backend for a step where the kernels could run, but for what ``trial`` finds."""
    if (reason := by_name_alone(device)) is not None:
        return reason
    if state != torch.float32:
        return f"its state is {state}, and what the kernels take of a GPU is recorded for float32"
    hidden = {width // widths[0] if width % widths[0] == 0 else None for width in widths[1:-1]}
    if chunk not in AUTO_CHUNKS or widths[0] not in AUTO_HEAD_WIDTHS or hidden - {AUTO_EXPANSION} or len(widths) > 4:
        return (
            f"what the kernels take of a GPU is recorded for chunks of {_listed(AUTO_CHUNKS)}, heads of "
            f"{_listed(AUTO_HEAD_WIDTHS)}, and up to two hidden layers {AUTO_EXPANSION} times as wide; its chunk is "
            f"{chunk} and its widths are {', '.join(map(str, widths))}"
        )
    capability = torch.cuda.get_device_capability(device)
    return step_too_large(len(widths) - 1, chunk, widths[0], capability)


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))


def load(device: torch.device) -> TritonStep:
    """The step by kernels. Raises BackendError where Triton does not interpret and ``device`` is a CPU."""
    from moshi_ttt.plugins.hybrid.triton import step_kernels

    if device.type == "cpu" and type(step_kernels.keys).__name__ != "InterpretedFunction":
        raise BackendError(
            "Triton was imported before TRITON_INTERPRET=1 was set, and compiles its kernels. Set it before the "
            "process starts."
        )
    return TritonStep()


class TritonStep:
    """The inner loop of one token, as ``recurrent_inner_loop``, and the step of a whole layer."""

    def __call__(
        self, tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor,
        exec_mask: Tensor | None = None, rule: UpdateRule | None = None, updated: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``y [B, 1, H * D]``, with zeros in rows where ``exec_mask`` is false."""
        assert isinstance(norm, InnerNorm)
        q, k, v, lr = (part.float().contiguous() for part in tokens)
        run, limit, chunk = operations(), largest_factor(torch.float32), token_scale.shape[0]
        check_parts(state, q, chunk)
        ok, now = run.look(q, k, v, lr, exec_mask, state["position"], state["spoiled"], chunk, limit)
        return _inner((q, k, v, lr), (ok, now, token_scale.float().contiguous()), state, norm, exec_mask, updated)

    def takes_layer(self, block: HybridBlock) -> bool:
        """Whether ``layer`` computes what is around the block's inner loop too; the block does so itself where not.

        Not with a short convolution, nor under a policy that computes in other dtypes than ``COMPUTED``.
        """
        roles = block.roles
        wide = all(dtype in COMPUTED for dtype in (roles.compute, roles.rope, roles.output))
        return wide and block.config.conv_kernel is None and block.info.dim <= MOST_CHANNELS

    def layer(
        self, block: HybridBlock, x: Tensor, value: Tensor, given: Tensor | None, state: BlockState,
        context: BlockContext,
    ) -> Tensor:  # fmt: skip
        """The step of a block: the output ``[B, 1, H D]``; the state is changed in place.

        Four products of torch's, and, around those kernels that ``step_kernels`` lists, ``prepare``, ``norm`` and
        ``gate``.

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


def check_parts(state: BlockState, q: Tensor, chunk: int) -> None:
    """Raise ContextError where a part of ``state`` has not the shape that a kernel would write to.

    Args:
        q: ``[B, 1, H, D]``.
        chunk: C.
    """
    batch, _, heads, width = q.shape
    fast, _ = unpack(state)
    head_width = width
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(COUNTERS, (batch,))
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
