"""The chunk form of the inner loop, its dual form: a whole call at once, chunk by chunk. What training runs.

See ``inner_loop`` for what is computed.

Shape legend: B streams, H heads, T tokens, N chunks, C tokens a chunk, D head width, L layers. Everything has the dtype
of the fast weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.hybrid.chunk_gradient import WholeChunks, is_written_out, written_out_inner_loop
from moshi_ttt.plugins.hybrid.fast_network import (
    ChunkMemory,
    FastNetwork,
    UpdateRule,
    after_chunk,
    chunk_gradients,
    query_pass,
)
from moshi_ttt.plugins.hybrid.inner_loop import Tokens, only_finite, pack, unpack
from moshi_ttt.plugins.hybrid.objective import InnerNorm, Objective


def chunk_inner_loop(
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
    whole: WholeChunks | None = None,
) -> tuple[Tensor, BlockState]:
    """The inner loop over a whole call.

    Args:
        tokens: those of the call.
        state: where to start; its ``position`` is zero in every row unless the layout has an ``offset``.
        norm: the inner loss and the output: with the inner LayerNorm, or without.
        token_scale: ``[C]`` per query position.
        layout: how the tokens lie in chunks of C.
        causal: False lets every query of a chunk use all of the chunk's keys.
        checkpoint_chunks: chunks in one activation checkpoint. Between the passes only the tokens and the fast weights
            at the start of each such group are kept. None: everything is kept.
        rule: how a finished chunk updates the fast weights; the state has to be one for it. None: a plain step.
        updated: ``[B]`` bool, rows whose updates are enabled (others have rates of zero); None: all.
        whole: what computes the chunks that are whole in every row, of the published form; None: this module.

    Returns:
        ``y [B, T, H * D]`` and the state after the last token.
    """
    heads, size, position = tokens.q.shape[2], layout.chunk_size, state["position"]
    rule, (fast, earlier), after = rule or UpdateRule(), unpack(state), position + layout.length
    tokens, finite = only_finite(tokens)
    nonfinite = ~finite if updated is None else updated[:, None] & ~finite  # [B, 1] over [B, T]
    # [B, T, 1] -> [B, N]: such tokens of each chunk, the first chunk's earlier ones among them
    num_nonfinite = layout.split(nonfinite[..., None]).sum((2, 3))
    num_nonfinite = torch.cat([num_nonfinite[:, :1] + state["spoiled"][:, None], num_nonfinite[:, 1:]], dim=1)  # [B, N]
    if isinstance(norm, InnerNorm) and is_written_out(norm, rule, token_scale.dtype):
        y, fast, earlier = written_out_inner_loop(
            tokens, fast, earlier, norm, token_scale, layout=layout, causal=causal,
            checkpoint_chunks=checkpoint_chunks, position=position, applied=num_nonfinite == 0, whole=whole,
        )  # fmt: skip
        counters = (after % size, *_counted(num_nonfinite, state["skipped"], after // size))
        return y, pack(counters, fast, earlier)
    # q, k, v [B, T, H, D] and lr [B, T, H] -> [B, T, H any] -> [B, H, N, C, any] -> N times [B, H, C, any]
    chunks = list(zip(*(layout.split(part.flatten(2), heads).unbind(2) for part in tokens), strict=True))
    assert whole is None  # it is of the written-out form
    call = _Call(layout, causal, norm, token_scale, rule, position, after, num_nonfinite, earlier, updated)
    now = _flattened(fast, _map(earlier, torch.zeros_like))
    needed = (*tokens, *now, token_scale, *norm.learned, *rule.learned)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
        checkpoint_chunks = None
    found, end = _in_groups(call.group, chunks, now, checkpoint_chunks)
    if not norm.bounded:
        num_nonfinite = torch.stack(found[1::2], dim=1)  # N times [B] -> [B, N]
    counters = (after % size, *_counted(num_nonfinite, state["skipped"], after // size))
    y = layout.merge(torch.stack(found[::2], dim=2))  # N times [B, H, C, D] -> [B, H, N, C, D] -> [B, T, H D]
    return y, pack(counters, *call.unflattened(end))


class _Call:
    """What the chunks of one call share: everything but their tokens and what goes from one chunk to the next.

    Args:
        position: ``[B]``, tokens of the first chunk that came before the call.
        after: ``[B]``, those plus the call's.
        num_nonfinite: ``[B, N]``, tokens of each chunk that are not finite.
        earlier: the first chunk's keys and gradients from before the call.
        updated: as in ``chunk_inner_loop``.
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
        num_nonfinite: Tensor,
        earlier: ChunkMemory,
        updated: Tensor | None,
    ) -> None:
        size, device = layout.chunk_size, position.device
        self.updated = updated
        self.layout, self.norm, self.rule = layout, norm, rule
        self.position, self.after, self.num_nonfinite = position, after, num_nonfinite.unbind(1)  # N times [B]
        self.applied = (num_nonfinite == 0).unbind(1)  # N times [B]
        self.earlier = None if layout.offset is None else earlier
        self.layers, self.has_tokens, self.has_velocity = (
            len(earlier.inputs), len(earlier.tokens) > 0, rule.momentum is not None,
        )  # fmt: skip
        # [C, C]: query, key
        self.mask = torch.ones(size, size, dtype=torch.bool, device=device).tril() if causal else None
        # [C], [C, 1] and []
        self.token_scale, self.scale, self.last_scale = token_scale, token_scale[:, None], token_scale[-1]
        self.valid = layout.valid[:, None, :, :, None].unbind(2)  # [B or 1, N, C] -> N times [B or 1, 1, C, 1]

    def group(self, first: int, last: int, *given: Tensor) -> tuple[Tensor, ...]:
        """Chunks ``first`` to ``last - 1``: output ``[B, H, C, D]`` and nonfinite tokens ``[B]`` of each.

        Then the fast weights and the unfinished chunk. ``given`` are q, k, v and lr of each, then what the group starts
        from. What is kept for another call of it has to be among them: an activation checkpoint around this one frees
        its arguments and nothing else.
        """
        fast, unfinished = self.unflattened(given[4 * (last - first) :])
        outputs = []
        for n in range(first, last):
            q, k, v, lr = given[4 * (n - first) : 4 * (n - first) + 4]
            memory, num_nonfinite, applied = self._memory(n, k, v, lr, fast)
            y = query_pass(q, fast, memory, self.norm, self.scale, self.mask, self.rule.momentum)
            outputs += [y, num_nonfinite]
            fast, unfinished = self._end(n, fast, memory, unfinished, applied)
        return *outputs, *_flattened(fast, unfinished)

    def _memory(
        self, n: int, k: Tensor, v: Tensor, lr: Tensor, fast: FastNetwork
    ) -> tuple[ChunkMemory, Tensor, Tensor]:
        """The keys and gradients of chunk ``n``, from this call and from before it.

        And ``[B]`` its tokens that are not finite, and whether its update is applied when it ends.
        """
        memory, bounded = chunk_gradients(k, v, lr, fast, self.norm, self.token_scale)
        num_nonfinite, applied = self.num_nonfinite[n], self.applied[n]
        if bounded is not None:
            unbounded = self.valid[n][:, 0, :, 0] & ~bounded  # [B or 1, 1, C, 1] -> [B or 1, C], and [B, C]
            unbounded = unbounded if self.updated is None else self.updated[:, None] & unbounded  # [B, 1] over [B, C]
            num_nonfinite = num_nonfinite + unbounded.sum(1)
            applied = num_nonfinite == 0
        if self.has_tokens:
            memory.tokens = (v, lr)
        if not self.layout.full:
            memory = _where(self.valid[n], memory, None)
        if n == 0 and self.earlier is not None:
            mask = torch.arange(self.layout.chunk_size, device=self.position.device) < self.position[:, None]  # [B, C]
            memory = _where(mask[:, None, :, None], self.earlier, memory)  # [B, 1, C, 1]
        return memory, num_nonfinite, applied

    def _end(
        self, n: int, fast: FastNetwork, memory: ChunkMemory, unfinished: ChunkMemory, rows: Tensor
    ) -> tuple[FastNetwork, ChunkMemory]:
        """The fast weights after chunk ``n``, updated in ``rows [B]``, and the chunk where the call ends in it."""
        size, length, scale = self.layout.chunk_size, self.layout.length, self.last_scale
        if self.layout.offset is None:
            if (n + 1) * size > length:
                return fast, memory
            return after_chunk(fast, memory, self.norm, scale, rows, self.rule), unfinished
        after = self.after
        fast = after_chunk(fast, memory, self.norm, scale, rows & (after >= (n + 1) * size), self.rule)
        if (n + 1) * size > length:  # wherever a row began, an earlier chunk ends in this call
            stops_here = (after >= n * size) & (after < (n + 1) * size)
            unfinished = _where(stops_here.view(-1, 1, 1, 1), memory, unfinished)  # [B] -> [B, 1, 1, 1]
        return fast, unfinished

    def unflattened(self, tensors: tuple[Tensor, ...]) -> tuple[FastNetwork, ChunkMemory]:
        """The inverse of ``_flattened``."""
        n, rest = self.layers, iter(tensors)
        counts = (n, n, 2 * n if self.has_velocity else 0, n, n, 2 if self.has_tokens else 0)
        weights, biases, velocity, inputs, gradients, tokens = (tuple(islice(rest, count)) for count in counts)
        return FastNetwork(weights, biases, velocity), ChunkMemory(inputs, gradients, tokens)


def _counted(num_nonfinite: Tensor, skipped: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
    """The counters ``[B]`` after a call: nonfinite tokens of the unfinished chunk, and skipped updates.

    ``num_nonfinite [B, N]`` of each chunk of the call, ``skipped [B]`` before it, ``finished [B]`` chunks that ended in
    it.
    """
    chunk = torch.arange(num_nonfinite.shape[1], device=num_nonfinite.device)
    ended = chunk < finished[:, None]  # [N] and [B, 1] -> [B, N]
    unfinished = torch.where(chunk == finished[:, None], num_nonfinite, 0).sum(1)
    return unfinished, skipped + (ended & (num_nonfinite > 0)).sum(1)


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
    """``chosen`` where ``mask`` is true, ``other`` elsewhere (None: zero, a slot without a token).

    ``mask``: ``[B or 1, 1, C or 1, 1]``, for tensors ``[B, H, C, any]``.
    """

    def pick(xs: tuple[Tensor, ...], ys: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return tuple(torch.where(mask, x, 0 if ys is None else ys[i]) for i, x in enumerate(xs))

    inputs, gradients, tokens = (None,) * 3 if other is None else (other.inputs, other.gradients, other.tokens)
    return ChunkMemory(
        pick(chosen.inputs, inputs), pick(chosen.gradients, gradients), pick(chosen.tokens, tokens)
    )  # fmt: skip
