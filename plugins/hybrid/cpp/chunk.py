"""The chunk form of the inner loop in C++, with its backward pass: chunk.cpp, built on the machine that trains.

It computes what ``chunk`` does with the published options, in float32 and float64, on a CPU. A thread computes all
chunks of a row and head one after the other, so that its fast weights stay in the cache.

Shape legend: B streams, H heads, R = B H rows, T tokens, N chunks, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.native import NativeLibrary, common_headers
from moshi_ttt.plugins.hybrid.chunk import counted, nonfinite_tokens
from moshi_ttt.plugins.hybrid.chunk_gradient import is_written_out
from moshi_ttt.plugins.hybrid.cpp import PARTS
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, pack, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective

_FOLDER = Path(__file__).parent
LIBRARY = NativeLibrary(
    name="moshi_ttt_hybrid_chunk",
    what="The compiled inner loop of the hybrid layer",
    source=_FOLDER / "chunk.cpp",
    headers=(
        *(_FOLDER / f"{name}.h" for name in (*PARTS, "head", "head_backward", "call")),
        *common_headers("parallel", "vectors"),
    ),
    flags=("-march=native", "-ffp-contract=fast"),
    otherwise="With backend: {train: torch} the same results come from tensor operations.",
)
DTYPES = (torch.float32, torch.float64)

Tensors = tuple[Tensor, ...]


@functools.cache
def operations() -> Any:
    """chunk.cpp as operations of torch's.

    Raises BackendError where they cannot be built.
    """
    LIBRARY.load()
    torch.library.register_fake(f"{LIBRARY.name}::finite", lambda q, *_: q.new_empty(q.shape[:2], dtype=torch.bool))
    torch.library.register_fake(f"{LIBRARY.name}::forward", _forward_shapes)
    torch.library.register_fake(f"{LIBRARY.name}::backward", _backward_shapes)
    return getattr(torch.ops, LIBRARY.name)


def load(use: object) -> Callable[..., tuple[Tensor, BlockState]]:
    """``cpp_inner_loop``, built. Raises BackendError where it cannot be built."""
    operations()
    return cpp_inner_loop


def cpp_inner_loop(
    tokens: Tokens,
    state: BlockState,
    norm: Objective,
    token_scale: Tensor,
    *,
    layout: ChunkLayout,
    causal: bool = True,
    checkpoint_chunks: int | None = None,
    rule: UpdateRule | None = None,
    updated: Tensor | None = None,
) -> tuple[Tensor, BlockState]:
    """As ``chunk_inner_loop``, for the published form.

    Between the passes the fast weights at the start of every group of chunks are kept, and nothing else: of
    ``checkpoint_chunks`` chunks, at most the square root of N R, or None of the square root of N. The backward pass
    computes a group again; a thread then holds the fast weights of one head at each of its chunks. No result depends on
    it.
    """
    if not isinstance(norm, InnerNorm) or not is_written_out(norm, rule or UpdateRule(), token_scale.dtype):
        raise ValueError(
            "The compiled inner loop is for the published form: the inner LayerNorm, one step, no momentum."
        )
    fast, earlier = unpack(state)
    with torch.no_grad():
        finite = operations().finite(*tokens, largest_factor(tokens.q.dtype))
    num_nonfinite = nonfinite_tokens(finite, state, layout, updated)
    layers, rows = len(fast.weights), tokens.q.shape[0] * tokens.q.shape[2]
    call = _CompiledCall(
        layers, layout.offset, finite, num_nonfinite == 0, causal, norm.eps,
        _stride(layout.num_chunks, rows, checkpoint_chunks),
    )  # fmt: skip
    given = (
        *tokens, norm.weight, norm.bias, token_scale, *fast.weights, *fast.biases, *earlier.inputs, *earlier.gradients
    )  # fmt: skip
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        y, *after = _CompiledChunks.apply(call, *given)  # type: ignore[no-untyped-call]
    else:
        y, *after = call.forward(given, keep=False)[:-1]
    weights, biases, inputs, gradients = (tuple(after[i * layers : (i + 1) * layers]) for i in range(4))
    end = state["position"] + layout.length
    counters = (
        end % layout.chunk_size,
        *counted(num_nonfinite, state["skipped"], end // layout.chunk_size),
    )
    return y, pack(counters, FastNetwork(weights, biases), ChunkMemory(inputs, gradients))


def _stride(chunks: int, rows: int, together: int | None) -> int:
    """Every how many chunks the fast weights are kept."""
    if together is None:
        return max(1, math.isqrt(chunks))
    return max(1, min(together, chunks, math.isqrt(chunks * rows)))


@dataclass(frozen=True)
class _CompiledCall:
    """What a call has that no gradient is taken of.

    Attributes:
        offset: ``[B]``, tokens of the first chunk that came before the call; None: none.
        finite: ``[B, T]`` bool; other tokens are taken for zeros.
        applied: ``[B, N]`` bool, chunks whose update is applied if they end in the call.
        stride: the fast weights are kept every so many chunks.
    """

    layers: int
    offset: Tensor | None
    finite: Tensor
    applied: Tensor
    causal: bool
    eps: float
    stride: int

    def forward(self, given: Sequence[Tensor], keep: bool) -> Tensors:
        """The output, the state after the call, and the fast weights that the backward pass needs."""
        return tuple(operations().forward(*self._arguments(given), self.stride if keep else 0))

    def backward(self, given: Sequence[Tensor], kept: Tensor, upstream: list[Tensor]) -> Tensors:
        return tuple(operations().backward(*self._arguments(given), kept, self.stride, upstream))

    def _arguments(self, given: Sequence[Tensor]) -> tuple[Any, ...]:
        parts = (list(given[7 + i * self.layers : 7 + (i + 1) * self.layers]) for i in range(4))
        return *given[:4], self.offset, self.finite, self.applied, *given[4:7], *parts, self.causal, self.eps


class _CompiledChunks(torch.autograd.Function):
    """All chunks of a call: y ``[B, T, H D]``, then the weights, biases, inputs and gradients that it leaves."""

    @staticmethod
    def forward(ctx: Any, call: _CompiledCall, *given: Tensor) -> Tensors:
        *results, kept = call.forward(given, keep=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, kept)
        ctx.like = [(result.shape, result.dtype) for result in results]
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _CompiledCall = ctx.call
        *given, kept = ctx.saved_tensors
        if all(each is None for each in upstream):
            return (None,) * (1 + len(given))
        of = [
            torch.zeros(shape, dtype=dtype) if each is None else each
            for each, (shape, dtype) in zip(upstream, ctx.like, strict=True)
        ]
        return None, *call.backward(given, kept, of)


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, offset: Tensor | None, finite: Tensor, applied: Tensor, gamma: Tensor,
    beta: Tensor, token_scale: Tensor, weights: list[Tensor], biases: list[Tensor], inputs: list[Tensor],
    gradients: list[Tensor], causal: bool, eps: float, stride: int,
) -> list[Tensor]:  # fmt: skip
    """Tensors like the results, for tensors without values."""
    rows, chunks = q.shape[0] * q.shape[2], applied.shape[1]
    widths = [q.shape[3], *(weight.shape[3] for weight in weights)]
    numbers = operations().numbers(widths, token_scale.shape[0], q.dtype == torch.float64)
    states = -(-chunks // stride) if stride else 0
    return [
        q.new_empty(q.shape[0], q.shape[1], q.shape[2] * q.shape[3]),
        *(part.new_empty(part.shape) for parts in (weights, biases, inputs, gradients) for part in parts),
        q.new_empty(rows, states, numbers),
    ]


def _backward_shapes(*given: Any) -> list[Tensor]:
    """Tensors like the gradients, for tensors without values."""
    tensors = [*given[:4], *given[7:10], *(part for parts in given[10:14] for part in parts)]
    return [tensor.new_empty(tensor.shape) for tensor in tensors]
