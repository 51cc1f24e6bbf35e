"""A call of any number of tokens, functionally: what training runs, and carried state.

The call's tokens are cut into chunks, the first of which continues the stream's unfinished chunk. What the updates of
earlier chunks add to each token comes from the chunkwise or the parallel form, whichever does less work; with a
correcting update, chunk by chunk from ``corrections``.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width, K taps that reach a token of the
same chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.block import BlockContext
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common.finite import finite_tokens
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.chunkwise import chunkwise_in_place
from moshi_ttt.plugins.gating_mlp.corrections import ChunkwiseMemory, ParallelMemory, Unfinished, corrected
from moshi_ttt.plugins.gating_mlp.memory import CallChunks, Memory
from moshi_ttt.plugins.gating_mlp.parallel import parallel_in_place, prefers_parallel


class CallTokens(NamedTuple):
    """A call's tokens: what they read with, and the chunks that are written.

    Attributes:
        queries: ``[B, T, h]``, or with a state ``[B, N C, h]``.
        answers: ``[B, N C, d]``, what the memory gives for the queries, before the projection; None where updates do
            not depend on it.
        target: ``[B, T, d]``, with the success gate.
        chunks: what updates are made of.
        finite: ``[B, T, 1]``, tokens whose query counts, where the others' are still to be taken as zero.
    """

    queries: Tensor
    answers: Tensor | None
    target: Tensor | None
    chunks: CallChunks
    finite: Tensor | None = None


@dataclass
class ChunkForm:
    """The call's form for one block. Not frozen: torch.compile cannot trace a frozen dataclass that holds tensors.

    Attributes:
        memory: the layout of the block's state and its update rule.
        conv: ``[d, 1, kernel]``, the filter of the targets.
        projection: ``[d, d]``.
        ridge: l ``[1]`` float64, with ``update: ridge``.
    """

    memory: Memory
    conv: Tensor
    projection: Tensor
    ridge: Tensor | None

    def tokens(
        self, key: Tensor, target: Tensor, rate: Tensor, layout: ChunkLayout, state: BlockState | None,
        context: BlockContext, start: Tensor | None,
    ) -> CallTokens:  # fmt: skip
        """The call's tokens, after the accumulated update ``start [B, h, d]``.

        Args:
            key: ``[B, T, h]``, in the host's dtype or in the state's; target: ``[B, T, d]``; rate: ``[B, T, 1]``, with
                ``update: ridge`` its root.
            layout: how the tokens lie in chunks of C.
            state: before the call; None at a sequence's start.
            context: of the call.
            start: None where nothing was accumulated.
        """
        memory, size = self.memory, self.memory.schedule.chunk
        finite = finite_tokens(key.detach().to(rate), target, rate)[..., None]  # [B, T] -> [B, T, 1]
        num_nonfinite = layout.split((~finite).to(rate)).sum((2, 3)).long()  # [B, N, C, 1] -> [B, N]
        mask, num_enabled = context.updates_mask(key), None
        if mask is not None or context.want_state:
            num_enabled = layout.valid.sum(2).expand(key.shape[0], -1)  # [B or 1, N, C] -> [B, N]
            num_enabled = num_enabled if mask is None else torch.where(mask[:, None], num_enabled, 0)  # [B, 1] over it
        # A key that is not finite would reach gradients that are summed over tokens, however it is masked after this.
        target, rate = (torch.where(finite, part, 0) for part in (target, rate))  # [B, T, 1] over [B, T, any]
        as_given = state is None and self._clears(layout.num_chunks, context)
        key = key if as_given else torch.where(finite, key.to(rate), 0)  # [B, T, 1] over [B, T, h]
        gate_target = target if memory.gated else None
        queries = key if state is None else layout.split(key).flatten(1, 2)  # [B, N, C, h] -> [B, N C, h]
        if memory.update_rule == "hebbian" and not context.want_state and state is None:
            keys = list(key.split(size, 1))  # the last may be shorter
        else:
            written = key * rate if memory.update_rule == "ridge" else context.where_updated(key)
            keys = list(layout.split(written).unbind(1))  # [B, T, h] -> N times [B, C, h]
        beyond = memory.taps if context.want_state else 0
        # [B, T, d] -> [B, N, C, d] -> [B, N, C + beyond, d]
        sums = ops.filtered(layout.split(target), self._reaching().to(target), memory.left, beyond)
        rate = F.pad(layout.split(rate), (0, 0, 0, beyond))  # [B, N, C, 1] -> [B, N, C + beyond, 1]
        seen, first = key.new_full((key.shape[0],), layout.length, dtype=torch.int64), None
        if state is not None:
            seen = seen + state["position"]
            tail = memory.conv_tail(state)[:, : size + beyond]  # [B, C + beyond, d + 1]
            sums, rate = _with_earlier(tail[..., :-1], sums), _with_earlier(tail[..., -1:], rate)
            first = memory.unfinished(state)
            num_nonfinite = _with_earlier(state["spoiled"], num_nonfinite)
            num_enabled = None if num_enabled is None else _with_earlier(state["enabled"], num_enabled)
        # Without a mask every chunk that ends in this call has a token whose updates are enabled.
        allowed = None if mask is None or num_enabled is None else num_enabled > 0
        ends = size * torch.arange(1, layout.num_chunks + 1, device=key.device)
        complete = seen[:, None] >= ends  # [B, 1] and [N] -> [B, N]
        if memory.update_rule == "hebbian":
            queries, chunks = self._summed(
                queries, keys, sums, rate, num_nonfinite, allowed, complete, seen, first, context
            )
            cleared = finite if as_given else None
            return CallTokens(queries, None, gate_target, replace(chunks, num_enabled=num_enabled), cleared)
        if state is None:
            queries = layout.split(queries).flatten(1, 2)  # [B, N, C, h] -> [B, N C, h]
        answers, chunks = self._corrected(
            queries, keys, sums, rate, num_nonfinite, allowed, complete, seen, first, start, context
        )
        return CallTokens(queries, answers, gate_target, replace(chunks, num_enabled=num_enabled))

    def answers(self, tokens: CallTokens, start: Tensor | None) -> Tensor:
        """``[B, T, d]``, with a state ``[B, N C, d]``: what the memory gives for each query, before the projection."""
        if tokens.answers is not None:
            return tokens.answers
        memory, queries, chunks = self.memory, tokens.queries, tokens.chunks
        values = chunks.values if memory.clip is None else chunks.values * chunks.scale[..., None, None]
        given = (
            queries, values.flatten(1, 2)[:, : queries.shape[1]], start, chunks.complete, chunks.scale != 0,
            memory.decay, memory.schedule.chunk,
        )  # fmt: skip
        if self._is_parallel(values.shape[1]):
            return parallel_in_place(*given, finite=tokens.finite)
        return chunkwise_in_place(*given)

    def _clears(self, num_chunks: int, context: BlockContext) -> bool:
        """Whether the form itself takes keys that are not finite as zero, in a call that starts a sequence.

        Then no copy of the keys is kept. They are the hidden activation, which the host's own product keeps.
        """
        reads_alone = not context.want_state and self.memory.update_rule == "hebbian" and self.memory.clip is None
        return reads_alone and self._is_parallel(num_chunks)

    def _is_parallel(self, num_chunks: int) -> bool:
        schedule = self.memory.schedule
        return prefers_parallel(num_chunks * schedule.chunk, self.memory.width, schedule.hidden)

    def _summed(
        self, queries: Tensor, keys: list[Tensor], sums: Tensor, rate: Tensor, num_nonfinite: Tensor,
        allowed: Tensor | None, complete: Tensor, seen: Tensor, first: Unfinished | None, context: BlockContext,
    ) -> tuple[Tensor, CallChunks]:  # fmt: skip
        """Queries and chunks of ``update: hebbian``, whose updates do not depend on the memory."""
        size = self.memory.schedule.chunk
        values = (sums * rate)[:, :, :size]  # [B, N, C, d]
        if first is not None:
            earlier, settled = first.earlier[..., None], first.settled[..., None]  # [B, C] -> [B, C, 1]
            # [B, C, 1] over [B, C, any], which is the first chunk of [B, N C, h] and of [B, N, C, d]
            queries = torch.cat([torch.where(earlier, first.keys, queries[:, :size]), queries[:, size:]], dim=1)
            keys[0] = torch.where(earlier, first.keys, keys[0])
            values = torch.cat([torch.where(settled, first.values, values[:, 0])[:, None], values[:, 1:]], dim=1)
        applied = num_nonfinite == 0 if allowed is None else (num_nonfinite == 0) & allowed  # [B, N]
        scale, squares = applied.to(values.dtype), None
        if self.memory.clip is not None:
            squares = _squares(keys, values.double() @ context.cast(self.projection, torch.float64))
            scale = scale * ops.clip_scale(squares.sum(-1), self.memory.clip).to(scale)
        return queries, CallChunks(
            keys=keys, values=values, conv_tail=torch.cat([sums, rate], dim=-1), complete=complete,
            num_nonfinite=num_nonfinite, num_enabled=None, allowed=allowed, scale=scale, squares=squares, seen=seen,
        )  # fmt: skip

    def _corrected(
        self, queries: Tensor, keys: list[Tensor], sums: Tensor, rate: Tensor, num_nonfinite: Tensor,
        allowed: Tensor | None, complete: Tensor, seen: Tensor, first: Unfinished | None, start: Tensor | None,
        context: BlockContext,
    ) -> tuple[Tensor, CallChunks]:  # fmt: skip
        """Answers ``[B, N C, d]`` and chunks where a chunk's update depends on the answers to its keys."""
        decay, clip, (width, hidden) = self.memory.decay, self.memory.clip, (sums.shape[-1], queries.shape[-1])
        memory: ParallelMemory | ChunkwiseMemory
        if prefers_parallel(queries.shape[1], width, hidden):
            memory = ParallelMemory(start, decay)
        else:
            start = queries.new_zeros(queries.shape[0], hidden, width) if start is None else start
            memory = ChunkwiseMemory(start, decay)
        # [B, N C, h] -> [B, N, C, h]
        found = corrected(
            memory, queries.unflatten(1, (-1, self.memory.schedule.chunk)), keys, sums, rate, num_nonfinite, allowed,
            complete, first, self.ridge, None if clip is None else (clip, context.cast(self.projection, torch.float64)),
        )  # fmt: skip
        # N times [B, ...] -> [B, N, ...]
        chunks = CallChunks(
            keys=found.keys, values=torch.stack(found.values, dim=1),
            conv_tail=torch.cat([torch.stack(found.conv_tails, dim=1), rate], dim=-1), complete=complete,
            num_nonfinite=torch.stack(found.num_nonfinite, dim=1), num_enabled=None, allowed=allowed,
            scale=torch.stack(found.scales, dim=1), seen=seen,
            factors=found.factors,
            squares=torch.stack(found.squares, dim=1) if found.squares else None,
        )  # fmt: skip
        return torch.cat(found.answers, dim=1), chunks  # N times [B, C, d] -> [B, N C, d]

    def _reaching(self) -> Tensor:
        """``[d, 1, K]``: the filter's taps that can reach a token of the same chunk."""
        return self.conv[..., self.memory.first_tap : self.memory.first_tap + self.memory.taps]


def _with_earlier(earlier: Tensor, chunks: Tensor) -> Tensor:
    """``chunks [B, N, ...]`` with what the unfinished chunk had, ``earlier [B, ...]``, added to the first."""
    return torch.cat([chunks[:, :1] + earlier[:, None], chunks[:, 1:]], dim=1)


def _squares(keys: list[Tensor], values: Tensor) -> Tensor:
    """``[B, N, C]`` float64: what each token adds to the squared norm of its chunk's update.

    ``keys`` N times ``[B, C, h]`` (fewer tokens in the last), ``values [B, N, C, d]``, projected.
    """
    squares = [ops.squared_norm(k, v[:, : k.shape[1]]) for k, v in zip(keys, values.unbind(1), strict=True)]
    missing = values.shape[2] - squares[-1].shape[1]
    return torch.stack([*squares[:-1], F.pad(squares[-1], (0, missing))], dim=1)  # N times [B, C] -> [B, N, C]
