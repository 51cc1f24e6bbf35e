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

That is the published form. Options: another objective (``objective``: no LayerNorm, the target v, what is read f(q)),
momentum, and several steps a chunk (``fast_network.UpdateRule``). With momentum W_n has eta S too. The steps after the
first are made at the chunk's end, where all of its keys are known: a token reads what the first step makes of the keys
up to its own, so it stays causal, and the next chunk starts from the weights after the last step. One step without
momentum is the form above.

A token that is not finite, or too large (``only_finite``), takes no part: no other token sees it, and the update of
its chunk is skipped in its row, unless its own was disabled. Its own output means nothing.

Shape legend: B streams, H heads, N chunks, C tokens a chunk, D head width, L layers. Everything has the dtype of the
fast weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.common.fast_network import (
    ChunkMemory,
    FastNetwork,
    UpdateRule,
    after_chunk,
    descend_,
    query_pass,
    teach,
)
from moshi_ttt.plugins.common.finite import finite_tokens
from moshi_ttt.plugins.common.objective import Objective


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


# ---- state: the fast weights at the unfinished chunk's start, that chunk's memory, the position in it, its tokens that
# ---- are not finite (spoiled), and the updates skipped because of such tokens


COUNTERS = ("position", "spoiled", "skipped")


def initial_state(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    chunk_size: int,
    batch: int,
    *,
    momentum: bool = False,
    steps: int = 1,
) -> BlockState:
    """State at a chunk boundary from learned ``weights [H, in, out]`` and ``biases [H, 1, out]``, differentiable.

    ``momentum`` adds each one's velocity, and more than one of ``steps`` the unfinished chunk's values and rates.
    """
    state: BlockState = {name: torch.zeros(batch, dtype=torch.int64, device=weights[0].device) for name in COUNTERS}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        heads, fan_in, fan_out = weight.shape
        state[f"weight.{i}"] = weight.expand(batch, -1, -1, -1)
        state[f"bias.{i}"] = bias.expand(batch, -1, -1, -1)
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
    """The parts of a state."""
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


# ---- the fast path


def run(
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
    """The inner loop over a whole call.

    Args:
        tokens: the T tokens of the call.
        state: where to start; its ``position`` is zero in every row unless the layout has an ``offset``.
        norm: the inner loss and what is read: the inner LayerNorm, or none.
        token_scale: ``[C]`` per query position.
        layout: how the tokens lie in chunks of C.
        causal: False lets every query of a chunk use all of the chunk's keys.
        checkpoint_chunks: chunks that the backward pass computes again together. Between the passes only the tokens
            and the fast weights at the start of each such group are kept. None: everything is kept.
        rule: what a finished chunk does with its gradients; the state has to be one for it. None: a plain step.
        updated: ``[B]`` bool, rows whose updates are enabled (others have rates of zero); None: all.

    Returns:
        ``y [B, T, H * D]`` and the state after the last token.
    """
    heads, size, position = tokens.q.shape[2], layout.chunk_size, state["position"]
    rule = rule or UpdateRule()
    fast, before = unpack(state)
    after = position + layout.length
    tokens, finite = only_finite(tokens)
    # [B, N]: tokens of each chunk that are not finite; the first chunk goes on with those it had.
    spoiled = layout.split((~finite if updated is None else updated[:, None] & ~finite)[..., None]).sum((2, 3))
    spoiled = torch.cat([spoiled[:, :1] + state["spoiled"][:, None], spoiled[:, 1:]], dim=1)
    chunks = list(zip(*(layout.split(part.flatten(2), heads).unbind(2) for part in tokens), strict=True))
    call = _Call(layout, causal, norm, token_scale, rule, position, after, spoiled, before, updated)
    now = _flattened(fast, _map(before, torch.zeros_like))
    needed = (*tokens, *now, token_scale, *norm.learned, *rule.learned)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
        checkpoint_chunks = None
    found, end = _in_groups(call.group, chunks, now, checkpoint_chunks)
    if not norm.bounded:
        spoiled = torch.stack(found[1::2], dim=1)
    counters = (after % size, *_counted(spoiled, state["skipped"], after // size))
    return layout.merge(torch.stack(found[::2], dim=2)), pack(counters, *call.unflattened(end))


class _Call:
    """What the chunks of one call share: everything but their tokens and what goes from one chunk to the next.

    Args:
        position, after: ``[B]``, tokens of the first chunk that came before the call, and those plus the call's.
        spoiled: ``[B, N]``, tokens of each chunk that are not finite.
        before: the first chunk's memory of the tokens before the call.
        updated: as in ``run``.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        causal: bool,
        norm: Objective,
        token_scale: Tensor,
        rule: UpdateRule,
        position: Tensor,
        after: Tensor,
        spoiled: Tensor,
        before: ChunkMemory,
        updated: Tensor | None,
    ) -> None:
        size, device = layout.chunk_size, position.device
        self.updated = updated
        self.layout, self.norm, self.rule = layout, norm, rule
        self.position, self.after, self.spoiled = position, after, spoiled.unbind(1)
        self.applied = (spoiled == 0).unbind(1)
        self.begun = None if layout.offset is None else before
        self.layers, self.remembers, self.moves = len(before.inputs), len(before.tokens) > 0, rule.momentum is not None
        self.mask = torch.ones(size, size, dtype=torch.bool, device=device).tril() if causal else None
        self.token_scale, self.scale, self.last_scale = token_scale, token_scale[:, None], token_scale[-1]
        self.valid = layout.valid[:, None, :, :, None].unbind(2)

    def group(self, first: int, last: int, *given: Tensor) -> tuple[Tensor, ...]:
        """Chunks ``first`` to ``last - 1``: output and spoiled tokens of each, then fast weights and unfinished chunk.

        ``given`` are q, k, v and lr of each, then what the group starts from. What is kept for another call of it has
        to be among them: an activation checkpoint around this one frees its arguments and nothing else.
        """
        fast, unfinished = self.unflattened(given[4 * (last - first) :])
        outputs = []
        for n in range(first, last):
            q, k, v, lr = given[4 * (n - first) : 4 * (n - first) + 4]
            memory, spoiled, applied = self._memory(n, k, v, lr, fast)
            outputs += [query_pass(q, fast, memory, self.norm, self.scale, self.mask, self.rule.momentum), spoiled]
            fast, unfinished = self._end(n, fast, memory, unfinished, applied)
        return *outputs, *_flattened(fast, unfinished)

    def _memory(
        self, n: int, k: Tensor, v: Tensor, lr: Tensor, fast: FastNetwork
    ) -> tuple[ChunkMemory, Tensor, Tensor]:
        """What chunk ``n`` holds, the call's keys and those that came before it.

        And ``[B]`` its spoiled tokens, and whether its update is applied when it ends.
        """
        memory, kept = teach(k, v, lr, fast, self.norm, self.token_scale)
        spoiled, applied = self.spoiled[n], self.applied[n]
        if kept is not None:
            wrong = self.valid[n][:, 0, :, 0] & ~kept  # [B, C]
            spoiled = spoiled + (wrong if self.updated is None else self.updated[:, None] & wrong).sum(1)
            applied = spoiled == 0
        if self.remembers:
            memory.tokens = (v, lr)
        if not self.layout.full:
            memory = _where(self.valid[n], memory, None)
        if n == 0 and self.begun is not None:
            earlier = torch.arange(self.layout.chunk_size, device=self.position.device) < self.position[:, None]
            memory = _where(earlier[:, None, :, None], self.begun, memory)
        return memory, spoiled, applied

    def _end(
        self, n: int, fast: FastNetwork, memory: ChunkMemory, unfinished: ChunkMemory, rows: Tensor
    ) -> tuple[FastNetwork, ChunkMemory]:
        """The fast weights after chunk ``n``, updated in ``rows``, and the chunk where the call ends in it."""
        size, length, scale = self.layout.chunk_size, self.layout.length, self.last_scale
        if self.layout.offset is None:
            if (n + 1) * size > length:
                return fast, memory
            return after_chunk(fast, memory, self.norm, scale, rows, self.rule), unfinished
        after = self.after
        fast = after_chunk(fast, memory, self.norm, scale, rows & (after >= (n + 1) * size), self.rule)
        if (n + 1) * size > length:  # wherever a row began, an earlier chunk ends in this call
            stops_here = (after >= n * size) & (after < (n + 1) * size)
            unfinished = _where(stops_here.view(-1, 1, 1, 1), memory, unfinished)
        return fast, unfinished

    def unflattened(self, tensors: tuple[Tensor, ...]) -> tuple[FastNetwork, ChunkMemory]:
        """The inverse of ``_flattened``."""
        n, rest = self.layers, iter(tensors)
        counts = (n, n, 2 * n if self.moves else 0, n, n, 2 if self.remembers else 0)
        weights, biases, velocity, inputs, gradients, tokens = (tuple(islice(rest, count)) for count in counts)
        return FastNetwork(weights, biases, velocity), ChunkMemory(inputs, gradients, tokens)


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
    """Two outputs of each chunk and what the last one leaves; ``together`` chunks share an activation checkpoint."""
    outputs: list[Tensor] = []
    for first in range(0, len(chunks), together or len(chunks)):
        last = min(first + (together or len(chunks)), len(chunks))
        given = (*(tensor for chunk in chunks[first:last] for tensor in chunk), *now)
        if together is None:
            found = group(first, last, *given)
        else:
            found = checkpoint(group, first, last, *given, use_reentrant=False, preserve_rng_state=False)
        outputs += found[: 2 * (last - first)]
        now = found[2 * (last - first) :]
    return outputs, now


def _flattened(fast: FastNetwork, memory: ChunkMemory) -> tuple[Tensor, ...]:
    return *fast.weights, *fast.biases, *fast.velocity, *memory.inputs, *memory.gradients, *memory.tokens


def _map(memory: ChunkMemory, function: Callable[[Tensor], Tensor]) -> ChunkMemory:
    parts = (memory.inputs, memory.gradients, memory.tokens)
    return ChunkMemory(*(tuple(map(function, part)) for part in parts))


def _where(mask: Tensor, chosen: ChunkMemory, other: ChunkMemory | None) -> ChunkMemory:
    """``chosen`` where ``mask`` is true, ``other`` elsewhere (None: zero, a slot without a token)."""

    def pick(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return tuple(torch.where(mask, x, 0 if ys is None else ys[i]) for i, x in enumerate(xs))

    inputs, gradients, tokens = (None,) * 3 if other is None else (other.inputs, other.gradients, other.tokens)
    return ChunkMemory(
        pick(chosen.inputs, inputs), pick(chosen.gradients, gradients), pick(chosen.tokens, tokens)
    )  # fmt: skip


@torch.no_grad()
def step(
    tokens: Tokens,
    state: BlockState,
    norm: Objective,
    token_scale: Tensor,
    exec_mask: Tensor | None = None,
    rule: UpdateRule | None = None,
    updated: Tensor | None = None,
) -> Tensor:
    """One token of every stream, causal; ``state`` is updated in place and no value is read on the host.

    Args:
        tokens: with T = 1.
        state: buffers; rows where ``exec_mask [B]`` is false stay bit-equal.
        rule, updated: as in ``run``.

    Returns:
        ``y [B, 1, H * D]``.
    """
    position = state["position"]
    fast, memory = unpack(state)
    tokens, finite = only_finite(tokens)
    # [B, 1, H, D] -> [B, H, 1, D]
    q, k, v, lr = (part.transpose(1, 2) for part in tokens._replace(lr=tokens.lr[..., None]))
    size = memory.inputs[0].shape[2]
    token, kept = teach(k, v, lr, fast, norm, token_scale)
    finite = finite if kept is None else finite & kept
    buffers = memory.inputs + memory.gradients + memory.tokens
    heard = token.inputs + token.gradients + ((v, lr) if memory.tokens else ())
    for buffer, value in zip(buffers, heard, strict=True):
        slot = position.view(-1, 1, 1, 1).expand(-1, buffer.shape[1], 1, buffer.shape[3])
        if exec_mask is not None:
            value = torch.where(row_mask(exec_mask, value), value, buffer.gather(2, slot))
        buffer.scatter_(2, slot, value)
    seen = (torch.arange(size, device=position.device) <= position[:, None])[:, None]
    # Slots ahead of the position hold nothing; whatever lies there (even nan) is replaced, not multiplied by zero.
    gradients = tuple(torch.where(seen[..., None], g, 0) for g in memory.gradients)
    written = ChunkMemory(memory.inputs, gradients, memory.tokens)
    rule = rule or UpdateRule()
    scale = token_scale[position].view(-1, 1, 1, 1)
    y = query_pass(q, fast, written, norm, scale, seen[:, :, None], rule.momentum)
    done, bad, following = position == size - 1, ~finite[:, 0], (position + 1) % size
    bad = bad if updated is None else bad & updated
    if exec_mask is not None:
        done, bad, following = done & exec_mask, bad & exec_mask, torch.where(exec_mask, following, position)
    spoiled = state["spoiled"] + bad
    applied = done & (spoiled == 0)
    descend_(fast, written, norm, token_scale[-1], applied, rule)
    for buffer in buffers:
        buffer.masked_fill_(row_mask(done, buffer), 0)
    state["skipped"].add_(done > applied)
    state["spoiled"].copy_(spoiled.masked_fill_(done, 0))
    position.copy_(following)
    return y.transpose(1, 2).flatten(2)
