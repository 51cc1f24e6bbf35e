"""The inner loop of TTT-Linear, TTT-MLP and deeper fast networks: what it computes, its tokens and its state.

Sun et al. 2024, "Learning to (Learn at Test Time)", arXiv:2407.04620, sections 2.4 to 2.6; the MLP of any depth and the
non-causal chunk follow Dalal et al. 2025, "One-Minute Video Generation with Test-Time Training", arXiv:2504.05298.

A fast network f of L layers (gelu in between) learns, per stream and head, while the sequence runs:

    loss(W; t) = lr_t * 1/2 * || LN(f(k_t; W)) - (v_t - k_t) ||^2
    y_n        = q_n + LN(f(q_n; W_n)),    W_n = W - token_scale[n] * sum_{k <= n} grad loss(W; k)

with all gradients of a chunk taken at the chunk's first weights W, and the sum over the whole chunk when not causal.
The next chunk starts from W_n of the chunk's last token. No W_n is ever built: with a_i(t) the input of layer i for key
t and g_i(t) the gradient at its output, a query's product with layer i is

    x W_i + b_i - token_scale[n] * sum_{t <= n} (x . a_i(t) + 1) g_i(t)

That is the published form. Options: another objective (``objective``: no LayerNorm, the target v, the output f(q)),
momentum, and several steps a chunk (``fast_network.UpdateRule``). With momentum W_n has eta S too. The steps after the
first are made at the chunk's end, where all of its keys are known: a query sees what the first step makes of the keys
up to its own, so it stays causal, and the next chunk starts from the weights after the last step. One step without
momentum is the form above.

Three forms compute it: ``naive`` from the definition, ``chunk`` a whole call at once (the dual form, for training), and
``recurrent`` one token at a time, in place (for streaming).

A token that is not finite, or too large (``only_finite``), takes no part: it reaches no other token, and the update of
its chunk is skipped in its row, unless the token's own was disabled. Its own output means nothing.

Shape legend: B streams, H heads, T tokens, N chunks, C tokens a chunk, D head width, L layers. Everything has the dtype
of the fast weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import finite_tokens
from moshi_ttt.plugins.hybrid.fast_network import ChunkMemory, FastNetwork


class Tokens(NamedTuple):
    """What enters the inner loop, already normalized and rotated; the reconstruction target is v - k.

    ``q``, ``k``, ``v`` are ``[B, T, H, D]`` and ``lr [B, T, H]`` weighs each token's loss.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor


def only_finite(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """``tokens`` with zeros (q, k, v and rate) for those that are not finite or too large, and ``[B, T]`` bool.

    The second is true for a token whose q, k, v and rate are below ``finite.largest_factor`` in every head: a row's
    heads are updated together or not at all.
    """
    heads = tokens.lr.shape[2]
    packed = torch.cat([*(part.flatten(2) for part in tokens[:3]), tokens.lr], dim=-1)  # [B, T, 3 H D + H]
    finite = finite_tokens(packed)
    width = (packed.shape[-1] - heads) // 3  # H D
    packed = torch.where(finite[..., None], packed, 0)
    q, k, v, lr = packed.split_with_sizes([width, width, width, heads], dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))  # [B, T, H D] -> [B, T, H, D]
    return Tokens(q, k, v, lr), finite


# ---- state: the fast weights at the unfinished chunk's start, that chunk's keys and gradients, and three counters


COUNTERS = ("position", "spoiled", "skipped")
"""Each ``[B]`` int64: tokens in the unfinished chunk, those of them that are not finite (``num_nonfinite`` in the code;
saved streams have the earlier name), and the updates that were skipped because of such tokens."""


def initial_state(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    chunk_size: int,
    batch: int,
    *,
    momentum: bool = False,
    steps: int = 1,
) -> BlockState:
    """State at a chunk boundary, differentiable.

    Args:
        weights: the learned initial ones, ``[H, in, out]`` per layer.
        biases: ``[H, 1, out]`` per layer.
        chunk_size: C.
        batch: B.
        momentum: adds the velocity of each weight and bias.
        steps: more than one adds the unfinished chunk's values and rates.
    """
    state: BlockState = {name: torch.zeros(batch, dtype=torch.int64, device=weights[0].device) for name in COUNTERS}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        heads, fan_in, fan_out = weight.shape
        state[f"weight.{i}"] = weight.expand(batch, -1, -1, -1)  # [H, in, out] -> [B, H, in, out]
        state[f"bias.{i}"] = bias.expand(batch, -1, -1, -1)  # [H, 1, out] -> [B, H, 1, out]
        state[f"input.{i}"] = weight.new_zeros(batch, heads, chunk_size, fan_in)
        state[f"gradient.{i}"] = weight.new_zeros(batch, heads, chunk_size, fan_out)
        if momentum:
            state[f"velocity_weight.{i}"] = weight.new_zeros(batch, heads, fan_in, fan_out)
            state[f"velocity_bias.{i}"] = bias.new_zeros(batch, heads, 1, fan_out)
    if steps > 1:
        heads, width, _ = weights[0].shape
        state["value"] = weights[0].new_zeros(batch, heads, chunk_size, width)
        state["rate"] = weights[0].new_zeros(batch, heads, chunk_size, 1)
    return state


def unpack(state: BlockState) -> tuple[FastNetwork, ChunkMemory]:
    """The fast network and the unfinished chunk of a state."""
    layers = range(sum(name.startswith("weight.") for name in state))

    def part(name: str) -> tuple[Tensor, ...]:
        return tuple(state[f"{name}.{i}"] for i in layers)

    velocity = (*part("velocity_weight"), *part("velocity_bias")) if "velocity_weight.0" in state else ()
    tokens = (state["value"], state["rate"]) if "value" in state else ()
    return FastNetwork(part("weight"), part("bias"), velocity), ChunkMemory(part("input"), part("gradient"), tokens)


def pack(counters: tuple[Tensor, ...], fast: FastNetwork, memory: ChunkMemory) -> BlockState:
    """The inverse of ``unpack``, with the ``COUNTERS``, each ``[B]``."""
    state: BlockState = dict(zip(COUNTERS, counters, strict=True))
    layers = len(fast.weights)
    names, parts = ["weight", "bias", "input", "gradient"], [fast.weights, fast.biases, memory.inputs, memory.gradients]
    if fast.velocity:
        names += ["velocity_weight", "velocity_bias"]
        parts += [fast.velocity[:layers], fast.velocity[layers:]]
    for i, tensors in enumerate(zip(*parts, strict=True)):
        state |= {f"{name}.{i}": tensor for name, tensor in zip(names, tensors, strict=True)}
    if memory.tokens:
        state |= dict(zip(("value", "rate"), memory.tokens, strict=True))
    return state
