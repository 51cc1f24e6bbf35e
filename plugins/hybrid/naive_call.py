"""The naive form as a backend: a call of a block, chunk by chunk, from the definition in ``naive``.

Every gradient is taken by autograd, and the weights of every token are built. It continues a state and gives the one
after it, with rows out of step, so that a block can train and stream by its definition. It reads no value on the CPU.

Shape legend: B streams, H heads, T tokens, N chunks, C tokens a chunk, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork, UpdateRule
from moshi_ttt.plugins.hybrid.inner_loop import COUNTERS, Tokens, only_finite, pack, unpack
from moshi_ttt.plugins.hybrid.naive import gelu, layer_norm, network
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective

Layers = Sequence[tuple[Tensor, Tensor]]
"""Weight and bias of each layer, ``[B, H, in, out]`` and ``[B, H, 1, out]``."""


def naive_call(
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
    """As ``chunk_inner_loop``, of the published form: with the inner LayerNorm, one step a chunk, no momentum.

    ``checkpoint_chunks`` changes nothing here.
    """
    assert isinstance(norm, InnerNorm)
    leaves = [*tokens, *(t for t in state.values() if t.is_floating_point()), token_scale, norm.weight, norm.bias]
    differentiable = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    with torch.enable_grad():
        call = _Definition(tokens, state, norm, token_scale, layout, causal, updated)
        outputs = torch.stack([call.chunk(n) for n in range(layout.num_chunks)], dim=2)  # [B, H, N, C, D]
        y, after = layout.merge(outputs), call.after()
    if not differentiable:
        y, after = y.detach(), {name: tensor.detach() for name, tensor in after.items()}
    return y, after


@torch.no_grad()
def naive_step(
    tokens: Tokens,
    state: BlockState,
    norm: Objective,
    token_scale: Tensor,
    exec_mask: Tensor | None = None,
    rule: UpdateRule | None = None,
    updated: Tensor | None = None,
) -> Tensor:
    """As ``recurrent_inner_loop``, of the published form."""
    size = state["input.0"].shape[2]
    layout = ChunkLayout(1, size, offset=state["position"])
    y, after = naive_call(tokens, state, norm, token_scale, layout=layout, updated=updated)
    for name, buffer in state.items():
        buffer.copy_(
            after[name] if exec_mask is None else torch.where(row_mask(exec_mask, buffer), after[name], buffer)
        )
    return y


class _Definition:
    """One call: the fast weights, the unfinished chunk and the counters, as they are before the next chunk."""

    def __init__(
        self, tokens: Tokens, state: BlockState, norm: InnerNorm, token_scale: Tensor, layout: ChunkLayout,
        causal: bool, updated: Tensor | None,
    ) -> None:  # fmt: skip
        heads = tokens.q.shape[2]
        tokens, finite = only_finite(tokens)
        nonfinite = ~finite if updated is None else updated[:, None] & ~finite  # [B, 1] over [B, T]
        self.nonfinite = layout.split(nonfinite[..., None]).sum((2, 3))  # [B, N]
        # q, k, v [B, T, H, D] and lr [B, T, H] -> [B, H, N, C, any]
        self.q, self.k, self.v, self.lr = (layout.split(part.flatten(2), heads) for part in tokens)
        fast, self.unfinished = unpack(state)
        self.fast: Layers = [(_tracked(w), _tracked(b)) for w, b in zip(fast.weights, fast.biases, strict=True)]
        self.position, self.spoiled, self.skipped = (state[name] for name in COUNTERS)
        self.end = self.position + layout.length  # [B]
        self.norm, self.token_scale, self.layout, self.causal = norm, token_scale, layout, causal

    def chunk(self, n: int) -> Tensor:
        """The outputs of chunk ``n``, ``[B, H, C, D]``; after it, the fast weights are those of the next chunk."""
        size, norm = self.layout.chunk_size, self.norm
        slot = torch.arange(size, device=self.position.device)
        earlier = slot < self.position[:, None] if n == 0 else slot < torch.zeros_like(self.position)[:, None]  # [B, C]
        held = slot < (self.end - n * size)[:, None]  # [B, C]: of this call, or from before it
        found = [self._token(n, c) for c in range(size)]
        inputs, gradients = (
            [torch.cat(parts, 2) for parts in zip(*each, strict=True)]  # C times [B, H, 1, any] -> [B, H, C, any]
            for each in zip(*found, strict=True)
        )
        inputs, gradients = (
            [
                # [B, C] -> [B, 1, C, 1]
                torch.where(earlier[:, None, :, None], old, torch.where(held[:, None, :, None], new, 0))
                for new, old in zip(now, before, strict=True)
            ]
            for now, before in ((inputs, self.unfinished.inputs), (gradients, self.unfinished.gradients))
        )
        outputs = []
        for c in range(size):
            seen = c + 1 if self.causal else size
            local = _descended(self.fast, inputs, gradients, self.token_scale[c], seen)
            q = self.q[:, :, n, c, None]  # [B, H, N, C, D] -> [B, H, 1, D]
            outputs.append(q + layer_norm(network(q, local), norm.weight, norm.bias, norm.eps))
        self._end(n, inputs, gradients)
        return torch.cat(outputs, 2)

    def _token(self, n: int, c: int) -> tuple[list[Tensor], list[Tensor]]:
        """Of one token, the inputs of the layers and the gradients of its loss at their outputs, ``[B, H, 1, any]``."""
        with torch.inference_mode(False):  # the gradient by the key is taken in every mode
            # [B, H, N, C, any] -> [B, H, 1, any]
            key, value, rate = (_ordinary(part[:, :, n, c, None]) for part in (self.k, self.v, self.lr))
            gamma, beta = _ordinary(self.norm.weight), _ordinary(self.norm.bias)
            inputs: list[Tensor] = []
            outputs: list[Tensor] = []
            for weight, bias in self.fast:
                inputs.append(gelu(outputs[-1]) if outputs else key)
                outputs.append(inputs[-1] @ _ordinary(weight) + _ordinary(bias))
            error = layer_norm(outputs[-1], gamma, beta, self.norm.eps) - (value - key)
            loss = (0.5 * rate * error**2).sum()
            return inputs, list(torch.autograd.grad(loss, outputs, create_graph=True))

    def _end(self, n: int, inputs: list[Tensor], gradients: list[Tensor]) -> None:
        size = self.layout.chunk_size
        nonfinite = self.nonfinite[:, n] + (self.spoiled if n == 0 else 0)  # [B]
        ends, stops = self.end >= (n + 1) * size, self.end // size == n  # [B]
        after = _descended(self.fast, inputs, gradients, self.token_scale[-1], size)
        rows = (ends & (nonfinite == 0))[:, None, None, None]
        now = [
            (torch.where(rows, w, old_w), torch.where(rows, b, old_b))
            for (w, b), (old_w, old_b) in zip(after, self.fast, strict=True)
        ]
        self.skipped = self.skipped + (ends & (nonfinite > 0))
        if n == 0:
            self._left = ChunkMemory(*(tuple(map(torch.zeros_like, part)) for part in (inputs, gradients)))
            self._spoiled = torch.zeros_like(self.spoiled)
        mask = stops[:, None, None, None]
        held = (torch.arange(size, device=self.end.device) < (self.end % size)[:, None])[
            :, None, :, None
        ]  # [B, 1, C, 1]
        self._left = ChunkMemory(
            *(
                tuple(torch.where(mask, torch.where(held, new, 0), old) for new, old in zip(part, left, strict=True))
                for part, left in ((inputs, self._left.inputs), (gradients, self._left.gradients))
            )
        )
        self._spoiled = torch.where(stops, nonfinite, self._spoiled)
        self.fast = now

    def after(self) -> BlockState:
        weights, biases = (tuple(part) for part in zip(*self.fast, strict=True))
        counters = (self.end % self.layout.chunk_size, self._spoiled, self.skipped)
        return pack(counters, FastNetwork(weights, biases), self._left)


def _descended(
    fast: Layers, inputs: Sequence[Tensor], gradients: Sequence[Tensor], scale: Tensor, seen: int
) -> list[tuple[Tensor, Tensor]]:
    """W - scale * sum of a g^T over the first ``seen`` slots, of each layer."""
    found = []
    for (weight, bias), a, g in zip(fast, inputs, gradients, strict=True):
        a, g = a[:, :, :seen], g[:, :, :seen]  # [B, H, seen, any]
        # [B, H, seen, in, 1] times [B, H, seen, 1, out]
        found.append((weight - scale * (a[..., None] * g[:, :, :, None]).sum(2), bias - scale * g.sum(2, keepdim=True)))
    return found


def _ordinary(tensor: Tensor) -> Tensor:
    """``tensor``; of one that was made in inference mode, a copy of which gradients can be taken."""
    return tensor.clone().requires_grad_() if tensor.is_inference() else tensor


def _tracked(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().clone().requires_grad_()
