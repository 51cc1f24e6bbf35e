"""The inner loop of TTT-Linear, TTT-MLP and deeper fast networks, in its dual form.

Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620, sections 2.4 to 2.6; the MLP of any depth and the
non-causal chunk follow Dalal et al. 2025, "One-Minute Video Generation with Test-Time Training", arXiv:2504.05298.

A fast network f of L layers (gelu in between) learns, per stream and head, while the sequence runs:

    loss(W; t) = lr_t * 1/2 * || LN(f(k_t; W)) - (v_t - k_t) ||^2
    y_n        = q_n + LN(f(q_n; W_n)),    W_n = W - token_scale[n] * sum_{k <= n} grad loss(W; k)

with all gradients of a chunk taken at the chunk's first weights W, and the sum over the whole chunk when not causal.
The next chunk starts from W_n of the chunk's last token. No W_n is ever built: with a_i(t) the input of layer i for key
t and g_i(t) the gradient at its output, a query's product with layer i is

    x W_i + b_i - token_scale[n] * sum_{t <= n} (x . a_i(t) + 1) g_i(t)

A token that is not finite, or too large (``only_finite``), takes no part: no other token sees it, and the update of
its chunk is skipped in its row. Its own output means nothing.

Shape legend: B streams, H heads, N chunks, C tokens a chunk, D head width, L layers. Everything has the dtype of the
fast weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.common.finite import finite_tokens


class Tokens(NamedTuple):
    """What enters the inner loop, already normalised and rotated; the reconstruction target is v - k.

    ``q``, ``k``, ``v`` are ``[B, T, H, D]`` and ``lr [B, T, H]`` weighs each token's loss.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor


def only_finite(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """``tokens`` with zeros, a rate of zero among them, for those that are not finite or too large, and which are kept.

    Kept are, ``[B, T]`` bool, tokens whose q, k, v and rate are below ``finite.largest_factor`` in every head: a row's
    heads are updated together or not at all.
    """
    heads = tokens.lr.shape[2]
    packed = torch.cat([*(part.flatten(2) for part in tokens[:3]), tokens.lr], dim=-1)  # [B, T, 3 H D + H]
    kept = finite_tokens(packed)
    width = (packed.shape[-1] - heads) // 3
    q, k, v, lr = torch.where(kept[..., None], packed, 0).split_with_sizes([width, width, width, heads], dim=-1)
    # [B, T, H D] -> [B, T, H, D]
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    return Tokens(q, k, v, lr), kept


@dataclass
class FastNetwork:
    """Weights ``[B, H, in, out]`` and biases ``[B, H, 1, out]`` of each layer."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


@dataclass
class InnerNorm:
    """The LayerNorm inside the loss and the output: ``weight`` and ``bias [H, D]``, and its eps.

    Attributes:
        exact: write the loss's gradient out. torch's own operation for it has a right first derivative and no right
            second one: it takes the mean and the standard deviation for constants by then.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    exact: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        """``z [B, H, C, D]`` normalised over D, then scaled per head."""
        return F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]

    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """d/dz of 1/2 * || LN(z) - target ||^2, for ``z`` and ``target`` ``[B, H, C, D]``."""
        if self.exact:
            return self._loss_gradient_written_out(z, target)
        shape = z.shape[-1:]
        normal, mean, rstd = torch.native_layer_norm(z, shape, None, None, self.eps)
        error = normal * self.weight[:, None] + self.bias[:, None] - target
        mask = [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(  # type: ignore[no-any-return]
            error * self.weight[:, None], z, shape, mean, rstd, None, None, mask
        )[0]

    def _loss_gradient_written_out(self, z: Tensor, target: Tensor) -> Tensor:
        """With n = (z - mean) r, r = 1 / sqrt(var + eps) and u = weight (LN(z) - target): r (u - m(u) - n m(u n)).

        m is the mean over D; half-precision numbers are computed with in float32, as torch's operation does.
        """
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        r = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        n = centred * r
        u = (n * self.weight[:, None] + self.bias[:, None] - target) * self.weight[:, None]
        return (r * (u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True))).to(z.dtype)


@dataclass
class ChunkMemory:
    """What a chunk's keys leave behind, per layer: inputs ``a [B, H, C, in]`` and gradients ``g [B, H, C, out]``.

    Gradients include the learning rate. Slots that hold no token have g = 0, so they change nothing.
    """

    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def forward(x: Tensor, fast: FastNetwork) -> Tensor:
    """f(x; W) for ``x [B, H, C, D]``."""
    for i, (weight, bias) in enumerate(zip(fast.weights, fast.biases, strict=True)):
        x = (F.gelu(x, approximate="tanh") if i else x) @ weight + bias
    return x


def key_pass(k: Tensor, v: Tensor, lr: Tensor, fast: FastNetwork, norm: InnerNorm) -> ChunkMemory:
    """Forward the keys ``k [B, H, C, D]`` and take the gradient of each token's loss at the chunk's first weights.

    ``v`` is like ``k``; ``lr [B, H, C, 1]`` weighs each token's loss.
    """
    inputs, outputs = [k], [k @ fast.weights[0] + fast.biases[0]]
    for weight, bias in zip(fast.weights[1:], fast.biases[1:], strict=True):
        inputs.append(F.gelu(outputs[-1], approximate="tanh"))
        outputs.append(inputs[-1] @ weight + bias)
    gradient = norm.loss_gradient(outputs[-1], v - k) * lr
    gradients = [gradient]
    for weight, output in zip(fast.weights[:0:-1], outputs[-2::-1], strict=True):
        gradient = torch.ops.aten.gelu_backward(gradient @ weight.mT, output, approximate="tanh")
        gradients.insert(0, gradient)
    return ChunkMemory(tuple(inputs), tuple(gradients))


def query_pass(
    q: Tensor, fast: FastNetwork, memory: ChunkMemory, norm: InnerNorm, scale: Tensor, mask: Tensor | None
) -> Tensor:
    """``q + LN(f(q; W_n))`` for queries ``q [B, H, Q, D]``.

    Args:
        scale: token scale of each query, ``[Q, 1]`` or ``[B, 1, Q, 1]``.
        mask: bool, true where query n may use key t, broadcast to ``[B, H, Q, C]``; None: every query uses every key.
    """
    x = q
    last = len(fast.weights) - 1
    for i, (weight, bias) in enumerate(zip(fast.weights, fast.biases, strict=True)):
        affinity = x @ memory.inputs[i].mT + 1
        if mask is not None:
            affinity = affinity.masked_fill(~mask, 0)
        output = x @ weight + bias - scale * (affinity @ memory.gradients[i])
        x = output if i == last else F.gelu(output, approximate="tanh")
    return q + norm(x)


def updated(fast: FastNetwork, memory: ChunkMemory, scale: Tensor, rows: Tensor | None = None) -> FastNetwork:
    """The weights after a whole chunk, W - scale * sum of gradients; only in rows where ``rows [B]`` is true."""
    weights, biases = [], []
    for weight, bias, a, g in zip(fast.weights, fast.biases, memory.inputs, memory.gradients, strict=True):
        if rows is not None:
            g = torch.where(row_mask(rows, g), g, 0)
        scaled = scale * g
        weights.append(weight - a.mT @ scaled)
        biases.append(bias - scaled.sum(-2, keepdim=True))
    return FastNetwork(tuple(weights), tuple(biases))


def applied_scale(scale: Tensor, rows: Tensor) -> Tensor:
    """``[B, 1, 1, 1]``: ``scale`` where ``rows [B]``, and elsewhere zero, which changes no bit of finite weights."""
    return torch.where(rows[:, None, None, None], scale, 0)


# ---- state: the fast weights at the unfinished chunk's start, that chunk's memory, the position in it, its tokens that
# ---- are not finite (spoiled), and the updates skipped because of such tokens


COUNTERS = ("position", "spoiled", "skipped")


def initial_state(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], chunk_size: int, batch: int) -> BlockState:
    """State at a chunk boundary from learned ``weights [H, in, out]`` and ``biases [H, 1, out]``, differentiable."""
    state: BlockState = {name: torch.zeros(batch, dtype=torch.int64, device=weights[0].device) for name in COUNTERS}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        heads, fan_in, fan_out = weight.shape
        state[f"weight.{i}"] = weight.expand(batch, -1, -1, -1)
        state[f"bias.{i}"] = bias.expand(batch, -1, -1, -1)
        state[f"input.{i}"] = weight.new_zeros(batch, heads, chunk_size, fan_in)
        state[f"gradient.{i}"] = weight.new_zeros(batch, heads, chunk_size, fan_out)
    return state


def unpack(state: BlockState) -> tuple[FastNetwork, ChunkMemory]:
    """The parts of a state."""
    layers = range(sum(name.startswith("weight.") for name in state))

    def part(name: str) -> tuple[Tensor, ...]:
        return tuple(state[f"{name}.{i}"] for i in layers)

    return FastNetwork(part("weight"), part("bias")), ChunkMemory(part("input"), part("gradient"))


def pack(counters: tuple[Tensor, ...], fast: FastNetwork, memory: ChunkMemory) -> BlockState:
    """The inverse of ``unpack``, with the ``COUNTERS``, each ``[B]``."""
    state: BlockState = dict(zip(COUNTERS, counters, strict=True))
    for i, parts in enumerate(zip(fast.weights, fast.biases, memory.inputs, memory.gradients, strict=True)):
        state |= dict(zip((f"weight.{i}", f"bias.{i}", f"input.{i}", f"gradient.{i}"), parts, strict=True))
    return state


# ---- the fast path


def run(
    tokens: Tokens,
    state: BlockState,
    norm: InnerNorm,
    token_scale: Tensor,
    *,
    layout: ChunkLayout,
    causal: bool = True,
    checkpoint_chunks: int | None = None,
) -> tuple[Tensor, BlockState]:
    """The inner loop over a whole call.

    Args:
        tokens: the T tokens of the call.
        state: where to start; its ``position`` is zero in every row unless the layout has an ``offset``.
        norm: the inner LayerNorm.
        token_scale: ``[C]`` per query position.
        layout: how the tokens lie in chunks of C.
        causal: False lets every query of a chunk use all of the chunk's keys.
        checkpoint_chunks: chunks that the backward pass computes again together. Between the passes only the tokens
            and the fast weights at the start of each such group are kept. None: everything is kept.

    Returns:
        ``y [B, T, H * D]`` and the state after the last token.
    """
    heads, size, position = tokens.q.shape[2], layout.chunk_size, state["position"]
    fast, before = unpack(state)
    after = position + layout.length
    tokens, finite = only_finite(tokens)
    # [B, N]: tokens of each chunk that are not finite; the first chunk goes on with those it had.
    spoiled = layout.split((~finite)[..., None]).sum((2, 3))
    spoiled = torch.cat([spoiled[:, :1] + state["spoiled"][:, None], spoiled[:, 1:]], dim=1)
    applied = spoiled == 0
    mask = torch.ones(size, size, dtype=torch.bool, device=position.device).tril() if causal else None
    scale, last_scale = token_scale[:, None], token_scale[-1]
    valid = layout.valid[:, None, :, :, None].unbind(2)
    unfinished, begun = _map(before, torch.zeros_like), None if layout.offset is None else before
    chunks = list(zip(*(layout.split(part.flatten(2), heads).unbind(2) for part in tokens), strict=True))

    def group(first: int, last: int, *given: Tensor) -> tuple[Tensor, ...]:
        """Chunks ``first`` to ``last - 1``: each one's output, then the fast weights and the unfinished chunk, flat.

        ``given`` are q, k, v and lr of each, then what the group starts from. What is kept for another call of it has
        to be among them: an activation checkpoint around this one frees its arguments and not its closure.
        """
        fast, unfinished = _unflattened(given[4 * (last - first) :])
        outputs = []
        for n in range(first, last):
            q, k, v, lr = given[4 * (n - first) : 4 * (n - first) + 4]
            memory = key_pass(k, v, lr, fast, norm)
            if not layout.full:
                memory = _where(valid[n], memory, None)
            if n == 0 and begun is not None:
                earlier = torch.arange(size, device=position.device) < position[:, None]
                memory = _where(earlier[:, None, :, None], begun, memory)
            outputs.append(query_pass(q, fast, memory, norm, scale, mask))
            if layout.offset is not None:
                fast = updated(fast, memory, last_scale, rows=applied[:, n] & (after >= (n + 1) * size))
                if (n + 1) * size > layout.length:  # wherever a row began, an earlier chunk ends in this call
                    stops_here = (after >= n * size) & (after < (n + 1) * size)
                    unfinished = _where(stops_here.view(-1, 1, 1, 1), memory, unfinished)
            elif (n + 1) * size <= layout.length:
                fast = updated(fast, memory, applied_scale(last_scale, applied[:, n]))
            else:
                unfinished = memory
        return *outputs, *_flattened(fast, unfinished)

    needed = (*tokens, *_flattened(fast, unfinished), token_scale, norm.weight, norm.bias)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
        checkpoint_chunks = None
    outputs, end = _in_groups(group, chunks, _flattened(fast, unfinished), checkpoint_chunks)
    counters = (after % size, *_counted(spoiled, state["skipped"], after // size))
    return layout.merge(torch.stack(outputs, dim=2)), pack(counters, *_unflattened(end))


def _counted(spoiled: Tensor, skipped: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
    """The counters ``[B]`` after a call: spoiled tokens of the unfinished chunk, and skipped updates.

    ``spoiled [B, N]`` of each chunk of the call, ``skipped [B]`` before it, ``finished [B]`` chunks that ended in it.
    """
    chunk = torch.arange(spoiled.shape[1], device=spoiled.device)
    ended = chunk < finished[:, None]
    unfinished = torch.where(chunk == finished[:, None], spoiled, 0).sum(1)
    return unfinished, skipped + (ended & (spoiled > 0)).sum(1)


def _in_groups(
    group: Callable[..., tuple[Tensor, ...]],
    chunks: Sequence[tuple[Tensor, ...]],
    now: tuple[Tensor, ...],
    together: int | None,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Each chunk's output and what the last one leaves; ``together`` chunks share an activation checkpoint."""
    outputs: list[Tensor] = []
    for first in range(0, len(chunks), together or len(chunks)):
        last = min(first + (together or len(chunks)), len(chunks))
        given = (*(tensor for chunk in chunks[first:last] for tensor in chunk), *now)
        if together is None:
            found = group(first, last, *given)
        else:
            found = checkpoint(group, first, last, *given, use_reentrant=False, preserve_rng_state=False)
        outputs += found[: last - first]
        now = found[last - first :]
    return outputs, now


def _flattened(fast: FastNetwork, memory: ChunkMemory) -> tuple[Tensor, ...]:
    return *fast.weights, *fast.biases, *memory.inputs, *memory.gradients


def _unflattened(tensors: tuple[Tensor, ...]) -> tuple[FastNetwork, ChunkMemory]:
    layers = len(tensors) // 4
    weights, biases, inputs, gradients = (tensors[i * layers : (i + 1) * layers] for i in range(4))
    return FastNetwork(weights, biases), ChunkMemory(inputs, gradients)


def _map(memory: ChunkMemory, function: Callable[[Tensor], Tensor]) -> ChunkMemory:
    return ChunkMemory(tuple(map(function, memory.inputs)), tuple(map(function, memory.gradients)))


def _where(mask: Tensor, chosen: ChunkMemory, other: ChunkMemory | None) -> ChunkMemory:
    """``chosen`` where ``mask`` is true, ``other`` elsewhere (None: zero, a slot without a token)."""

    def pick(xs: tuple[Tensor, ...], ys: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.where(mask, x, y) for x, y in zip(xs, ys, strict=True))

    zeros = (0,) * len(chosen.inputs)
    return ChunkMemory(
        pick(chosen.inputs, zeros if other is None else other.inputs),
        pick(chosen.gradients, zeros if other is None else other.gradients),
    )


@torch.no_grad()
def step(
    tokens: Tokens, state: BlockState, norm: InnerNorm, token_scale: Tensor, exec_mask: Tensor | None = None
) -> Tensor:
    """One token of every stream, causal; ``state`` is updated in place and no value is read on the host.

    Args:
        tokens: with T = 1.
        state: buffers; rows where ``exec_mask [B]`` is false stay bit-equal.

    Returns:
        ``y [B, 1, H * D]``.
    """
    position = state["position"]
    fast, memory = unpack(state)
    tokens, finite = only_finite(tokens)
    # [B, 1, H, D] -> [B, H, 1, D]
    q, k, v, lr = (part.transpose(1, 2) for part in tokens._replace(lr=tokens.lr[..., None]))
    size = memory.inputs[0].shape[2]
    token = key_pass(k, v, lr, fast, norm)
    for buffer, value in zip(memory.inputs + memory.gradients, token.inputs + token.gradients, strict=True):
        slot = position.view(-1, 1, 1, 1).expand(-1, buffer.shape[1], 1, buffer.shape[3])
        if exec_mask is not None:
            value = torch.where(row_mask(exec_mask, value), value, buffer.gather(2, slot))
        buffer.scatter_(2, slot, value)
    seen = (torch.arange(size, device=position.device) <= position[:, None])[:, None]
    # Slots ahead of the position hold nothing; whatever lies there (even nan) is replaced, not multiplied by zero.
    written = ChunkMemory(memory.inputs, tuple(torch.where(seen[..., None], g, 0) for g in memory.gradients))
    y = query_pass(q, fast, written, norm, token_scale[position].view(-1, 1, 1, 1), seen[:, :, None])
    done, bad, following = position == size - 1, ~finite[:, 0], (position + 1) % size
    if exec_mask is not None:
        done, bad, following = done & exec_mask, bad & exec_mask, torch.where(exec_mask, following, position)
    spoiled = state["spoiled"] + bad
    applied = done & (spoiled == 0)
    # A row that has not finished its chunk adds exact zeros: the update runs every step, so that a captured graph
    # needs no branch.
    factor = applied_scale(-token_scale[-1], applied)
    for weight, bias, a, g in zip(fast.weights, fast.biases, memory.inputs, written.gradients, strict=True):
        scaled = g * factor
        finished = torch.where(row_mask(applied, a), a, 0)
        weight.flatten(0, 1).baddbmm_(finished.flatten(0, 1).mT, scaled.flatten(0, 1))
        bias.add_(scaled.sum(-2, keepdim=True))
    for buffer in memory.inputs + memory.gradients:
        buffer.masked_fill_(row_mask(done, buffer), 0)
    state["skipped"].add_(done > applied)
    state["spoiled"].copy_(spoiled.masked_fill_(done, 0))
    position.copy_(following)
    return y.transpose(1, 2).flatten(2)
