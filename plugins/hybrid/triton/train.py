"""The backend ``triton`` of a training call: by kernels of this folder, and the rest by tensor operations.

A call that starts a sequence, and whose state is not used afterwards, is computed by kernels as a whole
(``TritonTrain.layer``). Otherwise kernels take the chunks that are whole in every row and begin with the call's own
tokens. What is left of a chunk that an earlier call began, the chunk in which the call ends, and what is around the
inner loop are then computed by the torch form (``chunk``, ``layer``).

Shape legend: B streams, H heads, N width of the host.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moshi_ttt.core.errors import BackendError
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import FastNetwork
from moshi_ttt.plugins.hybrid.inner_loop import Tokens
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.triton.backend import settings_of
from moshi_ttt.plugins.hybrid.triton.train_settings import Products, TrainSettings

if TYPE_CHECKING:
    from moshi_ttt.core.block import BlockContext
    from moshi_ttt.plugins.hybrid.block import HybridBlock

MOST_CHANNELS = 16384
"""Of the host: a program has a token."""


def load(device: torch.device, products: Products) -> TritonTrain:
    """The backend. Raises BackendError where ``device`` is a CPU and Triton does not interpret."""
    from moshi_ttt.plugins.hybrid.triton import linear_kernels

    if device.type == "cpu" and type(linear_kernels.linear_states).__name__ != "InterpretedFunction":
        raise BackendError(
            "Triton was imported before TRITON_INTERPRET=1 was set, and compiles its kernels. Set it before the "
            "process starts."
        )
    return TritonTrain(products)


class TritonTrain:
    """The inner loop of a call, as ``chunk_inner_loop``, and the call of a whole layer."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self._chunks = partial(chunk_inner_loop, whole=partial(whole_by_kernels, products=products))

    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor, BlockState]:
        return self._chunks(*given, **named)

    def takes_layer(self, block: HybridBlock, state: BlockState | None, context: BlockContext) -> bool:
        """Whether ``layer`` computes a call; else the block computes what is around the inner loop itself.

        Not from a given state, where the next one is wanted, on a grid, in a stream, with a short convolution or values
        of the embeddings, nor under a policy that computes in other dtypes than float32.
        """
        roles, config = block.roles, block.config
        starts = state is None and not context.want_state and context.coordinates is None and context.casts is None
        wide = all(dtype == torch.float32 for dtype in (roles.compute, roles.rope, roles.output))
        plain = config.conv_kernel is None and config.value == "hidden"
        return starts and wide and plain and block.info.dim <= MOST_CHANNELS

    def layer(
        self, block: HybridBlock, x: Tensor, context: BlockContext, gate: Tensor, token_scale: Tensor
    ) -> tuple[Tensor, BlockState]:
        """The output ``[B, T, N]`` for ``x [B, T, N]``, and the state after the last whole chunk, without a gradient.

        Args:
            gate: alpha, ``[N]`` or ``[1]``. token_scale: ``[C]``.
        """
        from moshi_ttt.plugins.hybrid.triton.train_layer import gated, inner_layer
        from moshi_ttt.plugins.hybrid.triton.train_projection import projected, projected_where_finite

        matmul = block.roles.matmul
        rates = Linear(block.lr_weight.flatten(0, 1), block.lr_bias.flatten())  # [H, 1, N] -> [H, N], [H, 1] -> [H]
        linears = [*(each.tensors() for each in (block.wq, block.wk, block.wv)), rates]
        parts, finite = projected_where_finite(x, linears, (matmul, matmul, matmul, torch.float32))
        fast = [p for pair in zip(block.fast_weight, block.fast_bias, strict=True) for p in pair]
        post = block.post_norm.tensors()
        out, spoiled, end = inner_layer(
            *parts, finite, context.updates_mask(x), (block.norm_weight, block.norm_bias), token_scale,
            (post.weight, post.bias), tuple(fast), self._numbers(block),
        )  # fmt: skip
        (added,) = projected(out, [block.wo.tensors()], (matmul,))
        y = gated(x, added, gate, block.volume_in(context))
        with torch.no_grad():
            state = block.init_state(x.shape[0], x.device)
            for i, (weight, bias) in enumerate(zip(end[::2], end[1::2], strict=True)):
                state |= {f"weight.{i}": weight, f"bias.{i}": bias}
            state["skipped"] = spoiled[:, : x.shape[1] // block.config.chunk].sum(1)  # [B, number of chunks] -> [B]
        return y, state

    def _numbers(self, block: HybridBlock) -> Any:
        from moshi_ttt.plugins.hybrid.triton.train_layer import LayerNumbers

        config, widths = block.config, block.widths(block.config, block.info.dim // block.info.num_heads)
        settings = settings_of(config.chunk, config.norm_eps, self.products, config.causal, config.checkpoint_chunks)
        return LayerNumbers(
            settings=_in_slices(settings, widths), heads=block.info.num_heads, base_rate=config.base_lr / widths[0],
            factor=float(block.inner_lr_factor), theta=config.rope_theta,
            target_eps=max(config.target_eps, torch.finfo(torch.float32).tiny), post_norm_eps=config.post_norm_eps,
            output=block.roles.matmul,
        )  # fmt: skip


def _in_slices(settings: TrainSettings, widths: tuple[int, ...]) -> TrainSettings:
    """Slices that fill the hidden width, where there is one: the largest power of two in it."""
    if len(widths) == 2:
        return settings
    return replace(settings, slice_width=min(settings.slice_width, widths[1] & -widths[1]))


def whole_by_kernels(
    tokens: Tokens, fast: FastNetwork, norm: InnerNorm, token_scale: Tensor, scale: Tensor, *, causal: bool,
    together: int | None, products: Products,
) -> tuple[Tensor, FastNetwork]:  # fmt: skip
    """See ``chunk_gradient.WholeChunks``; the fast weights are kept every ``together`` chunks, or ``GROUP`` tokens."""
    from moshi_ttt.plugins.hybrid.triton.linear_chunk import linear_chunks
    from moshi_ttt.plugins.hybrid.triton.mlp_chunk import mlp_chunks

    settings = settings_of(token_scale.shape[0], norm.eps, products, causal, together)
    if len(fast.weights) == 1:
        y, weight, bias = linear_chunks(
            *tokens, fast.weights[0], fast.biases[0], norm.weight, norm.bias, token_scale, scale, settings
        )
        return y, FastNetwork((weight,), (bias,))
    (w1, w2), (b1, b2) = fast.weights, fast.biases
    settings = _in_slices(settings, (w1.shape[2], w1.shape[3], w2.shape[3]))
    y, weights, biases = mlp_chunks(*tokens, (w1, w2), (b1, b2), norm.weight, norm.bias, token_scale, scale, settings)
    return y, FastNetwork(weights, biases)
