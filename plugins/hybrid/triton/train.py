"""The backend ``triton`` of a training call: by kernels of this folder, and the rest by tensor operations.

Most calls are computed by kernels as a whole (``TritonTrain.layer``). Otherwise kernels take the chunks that are whole
in every row and begin with the call's own tokens. What is left of a chunk that an earlier call began, the chunk in
which the call ends, and what is around the inner loop are then computed by the torch form (``chunk``, ``layer``).

Shape legend: B streams, H heads, N width of the host.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moshi_ttt.core.errors import BackendError
from moshi_ttt.core.state import BlockState, outlives_modes
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop, counted
from moshi_ttt.plugins.hybrid.chunk_gradient import WholeChunks
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, chunk_gradients
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, pack, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective
from moshi_ttt.plugins.hybrid.triton.backend import COMPUTED
from moshi_ttt.plugins.hybrid.triton.train_settings import Products, TrainSettings, settings_of
from moshi_ttt.plugins.hybrid.triton.tuning import tile_on

if TYPE_CHECKING:
    from moshi_ttt.core.block import BlockContext
    from moshi_ttt.plugins.hybrid.block import HybridBlock
    from moshi_ttt.plugins.hybrid.triton.train_layer import Continued, Found, LayerNumbers

MOST_CHANNELS = 16384
"""Of the host: a program has a token."""


def load(device: torch.device, products: Products, tunes: bool = False) -> TritonTrain:
    """The backend. Raises BackendError where ``device`` is a CPU and Triton does not interpret.

    ``tunes``: measure which tile is the fastest, at the first call of each shape on a GPU.
    """
    from moshi_ttt.plugins.hybrid.triton import linear_kernels

    if device.type == "cpu" and type(linear_kernels.linear_states).__name__ != "InterpretedFunction":
        raise BackendError(
            "Triton was imported before TRITON_INTERPRET=1 was set, and compiles its kernels. Set it before the "
            "process starts."
        )
    return TritonTrain(products, tunes and device.type == "cuda")


class TritonTrain:
    """The inner loop of a call, as ``chunk_inner_loop``, and the call of a whole layer."""

    def __init__(self, products: Products, tunes: bool = False) -> None:
        self.products, self.tunes = products, tunes
        self.whole: WholeChunks = partial(whole_by_kernels, products=products)
        self._chunks = partial(chunk_inner_loop, whole=self.whole)

    def __call__(
        self, tokens: Tokens, state: BlockState, norm: Objective, token_scale: Tensor, **named: Any
    ) -> tuple[Tensor, BlockState]:
        """As ``chunk_inner_loop``; from a state in bfloat16, in float32, and rounded to that at the end."""
        dtype = token_scale.dtype
        if dtype == torch.float32:
            return self._chunks(tokens, state, norm, token_scale, **named)
        assert isinstance(norm, InnerNorm)
        tokens = Tokens(*(part.float() for part in tokens))
        norm = InnerNorm(norm.weight.float(), norm.bias.float(), norm.eps, norm.exact)
        y, after = self._chunks(tokens, _in_dtype(state, torch.float32), norm, token_scale.float(), **named)
        return y.to(dtype), _in_dtype(after, dtype)

    def takes_layer(self, block: HybridBlock, state: BlockState | None, context: BlockContext, length: int) -> bool:
        """Whether ``layer`` computes a call of ``length`` tokens; else the block does what is around the inner loop.

        Not on a grid, in a stream, with a short convolution or values of the embeddings, nor under a policy that
        computes in other dtypes than ``COMPUTED``. From a given state: only where no gradient of its unfinished chunk
        is taken, and the call ends that chunk.
        """
        roles, config = block.roles, block.config
        here = context.coordinates is None and context.casts is None and block.info.dim <= MOST_CHANNELS
        wide = all(dtype in COMPUTED for dtype in (roles.compute, roles.rope, roles.output))
        if not (here and wide and config.conv_kernel is None and config.value == "hidden"):
            return False
        if state is None:
            return True
        memory = [tensor for name, tensor in state.items() if name.startswith(("input", "gradient"))]
        return length >= config.chunk and not any(tensor.requires_grad for tensor in memory)

    def layer(
        self, block: HybridBlock, x: Tensor, state: BlockState | None, context: BlockContext, gate: Tensor,
        token_scale: Tensor,
    ) -> tuple[Tensor, BlockState]:  # fmt: skip
        """The output ``[B, T, N]`` for ``x [B, T, N]``, and the state after it.

        Where it is not wanted, the state is that after the last whole chunk. Its fast weights go from chunk to chunk in
        float32, and it is rounded to its own dtype at the end.

        Args:
            gate: alpha, ``[N]`` or ``[1]``. token_scale: ``[C]``.
        """
        from moshi_ttt.plugins.hybrid.triton.train_layer import gated, inner_layer
        from moshi_ttt.plugins.hybrid.triton.train_projection import projected, projected_where_finite

        matmul, continues = block.roles.matmul, state is not None
        rates = Linear(block.lr_weight.flatten(0, 1), block.lr_bias.flatten())  # [H, 1, N] -> [H, N], [H, 1] -> [H]
        linears = [*(each.tensors() for each in (block.wq, block.wk, block.wv)), rates]
        parts, finite = projected_where_finite(x, linears, (matmul, matmul, matmul, torch.float32))
        state = block.init_state(x.shape[0], x.device) if state is None else state
        fast = [p for pair in zip(block.fast_weight, block.fast_bias, strict=True) for p in pair]
        if continues:
            fast = [state[f"{name}.{i}"] for i in range(len(block.fast_weight)) for name in ("weight", "bias")]
        norm, post = (block.norm_weight, block.norm_bias), block.post_norm.tensors()
        out, found = inner_layer(
            parts, finite, context.updates_mask(x), norm, token_scale, (post.weight, post.bias), tuple(fast),
            self._numbers(block, continues, x), _continued(state) if continues else None,
        )  # fmt: skip
        (added,) = projected(out, [block.wo.tensors()], (matmul,))
        y = gated(x, added, gate, block.volume_in(context))
        objective = InnerNorm(norm[0].float(), norm[1].float(), block.config.norm_eps)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not context.detach_state):
            after = _state_after(state, found, x.shape[1], context.want_state, objective, token_scale.float())
            return y, _in_dtype(after, block.roles.state)

    def _numbers(self, block: HybridBlock, given: bool, x: Tensor) -> LayerNumbers:
        from moshi_ttt.plugins.hybrid.triton.train_layer import LayerNumbers

        config, widths = block.config, block.widths(block.config, block.info.dim // block.info.num_heads)
        tile = None
        if self.tunes and outlives_modes(x):  # on tensors without values nothing can be measured
            tile = tile_on(x.device, config.chunk, widths, block.info.num_heads, x.shape[0], self.products)
        settings = settings_of(
            config.chunk, config.norm_eps, self.products, config.causal, config.checkpoint_chunks, tile
        )
        return LayerNumbers(
            settings=replace(_in_slices(settings, widths), given=given), heads=block.info.num_heads,
            base_rate=config.base_lr / widths[0],
            factor=float(block.inner_lr_factor), theta=config.rope_theta,
            target_eps=max(config.target_eps, torch.finfo(torch.float32).tiny), post_norm_eps=config.post_norm_eps,
            output=block.roles.matmul,
        )  # fmt: skip


def _in_dtype(state: BlockState, dtype: torch.dtype) -> BlockState:
    """``state`` with its floating-point tensors in ``dtype``."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _continued(state: BlockState) -> Continued:
    from moshi_ttt.plugins.hybrid.triton.train_layer import Continued

    last = sum(name.startswith("weight.") for name in state) - 1
    keys, gradients = state["input.0"].detach().contiguous(), state[f"gradient.{last}"].detach().contiguous()
    return Continued(position=state["position"], spoiled=state["spoiled"], keys=keys, gradients=gradients)


def _state_after(
    state: BlockState, found: Found, length: int, wanted: bool, norm: InnerNorm, token_scale: Tensor
) -> BlockState:
    """The state after a call of ``length`` tokens from ``state``; not ``wanted``, that after the last whole chunk."""
    size, after = token_scale.shape[0], state["position"] + length  # [B]
    unfinished, skipped = counted(found.num_nonfinite, state["skipped"], after // size)
    fast = FastNetwork(found.fast[::2], found.fast[1::2])
    if wanted:
        return pack((after % size, unfinished, skipped), fast, _unfinished(found, fast, after, norm, token_scale))
    _, nothing = unpack(state)
    return pack((torch.zeros_like(after), torch.zeros_like(after), skipped), fast, nothing)


def _unfinished(
    found: Found, fast: FastNetwork, after: Tensor, norm: InnerNorm, token_scale: Tensor
) -> ChunkMemory:  # fmt: skip
    """The keys and gradients of the chunk in which the call ends, at the fast weights after the last whole one."""
    size = token_scale.shape[0]
    slot = torch.arange(size, device=after.device)  # [C]
    first = (after // size).clamp(max=found.rates.shape[1] // size - 1) * size
    at = first[:, None] + slot, torch.arange(len(after), device=after.device)[:, None]  # [B, C] and [B, 1]
    # [B, slots, H, D] -> [B, C, H, D] -> [B, H, C, D]
    k, v = (each[at[1], at[0]].transpose(1, 2) for each in (found.keys, found.values))
    lr = found.rates[at[1], at[0]].transpose(1, 2)[..., None]  # [B, slots, H] -> [B, C, H] -> [B, H, C, 1]
    memory, _ = chunk_gradients(k, v, lr, fast, norm, token_scale)
    held = (slot < (after % size)[:, None])[:, None, :, None]  # [B, C] -> [B, 1, C, 1]
    return ChunkMemory(*(tuple(torch.where(held, t, 0) for t in p) for p in (memory.inputs, memory.gradients)))


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
