"""The recurrent form of in-place TTT: one streamed token, in place, with the same work at every step.

What is read a row: the update (h d numbers), the last finished chunk (C (h + d)), and, where updates are clipped, the
unfinished one. W_0 and the projection are read once for all rows.

Shape legend: B streams, C tokens a chunk, d width, h hidden width, K taps, R of them looking ahead, w channels folded a
step, m tokens moved a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_

import torch
from torch import Tensor

from moshi_ttt.core.state import BlockState, row_mask
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.common.success_gate import GateState, SuccessGate
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.memory import Memory
from moshi_ttt.plugins.gating_mlp.schedule import StepTables


class Stepper:
    """The step for B rows. It holds the constant tensors of a step, and no state."""

    def __init__(self, memory: Memory, like: Tensor) -> None:
        schedule, batch = memory.schedule, like.shape[0]
        self.memory = memory
        self.limit = largest_factor(like.dtype)
        self.tables = StepTables(schedule, batch, like.device)
        self.channel = torch.arange(schedule.hidden, device=like.device)
        self.window = torch.arange(-schedule.look_ahead, 1, device=like.device)
        self.order = (torch.arange(schedule.chunk, device=like.device) + schedule.staged) % schedule.chunk
        # Where a token's taps lie in the filter [d, 1, kernel]: the one for the earliest token it reaches comes first.
        taps = memory.first_tap + torch.arange(memory.taps - 1, -1, -1, device=like.device)
        self.taps = (taps[:, None] + memory.kernel * torch.arange(memory.width, device=like.device)).flatten()
        self.token = torch.arange(schedule.chunk, device=like.device)
        self.slot = (self.token - schedule.staged) % schedule.chunk  # of each token, in the order of ``order``
        self.eye = torch.eye(schedule.look_ahead + 1, dtype=like.dtype, device=like.device)
        self.new_tail = like.new_zeros(batch, 1, memory.width + 1)

    def step(
        self, state: BlockState, token: tuple[Tensor, Tensor, Tensor], conv: Tensor, projection: Tensor,
        active: Tensor | None, updated: Tensor | None = None, cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
        *, ridge: Tensor | None = None, success: SuccessGate | None = None,
    ) -> Tensor:  # fmt: skip
        """What the earlier chunks' updates add to the token's output, ``[B, 1, d]``; the token goes into ``state``.

        Zero for a token that is not finite.

        Args:
            token: key (the hidden activation) ``[B, 1, h]``, target ``[B, 1, d]`` and rate ``[B, 1, 1]`` (with
                ``update: ridge`` its root), in the state's dtype.
            conv: ``[d, 1, kernel]``; projection: ``[d, d]``.
            active: ``[B]`` bool, or None for all; the state of a row that is not stays as it is.
            updated: ``[B]`` bool, or None for all; the token of a row that is not (its rate is 0) updates nothing.
            cast: gives ``projection`` in another dtype.
            ridge: l ``[1]``, with ``update: ridge``; success: the success gate, where the block has one.
        """
        row = torch.cat(token, dim=-1)[:, 0]  # [B, 1, h + d + 1] -> [B, h + d + 1]
        finite = row.abs().amax(-1) < self.limit
        row = torch.where(finite[:, None], row, 0)  # [B, 1] over [B, h + d + 1]
        # the key [B, h], and target and rate together [B, d + 1]
        key, target = row.split_with_sizes([token[0].shape[-1], row.shape[1] - token[0].shape[-1]], dim=1)
        columns, channels, sources, key_slots, value_slots, folded, done, following = self.tables.at(
            state["position"], active
        )
        forgotten = None
        if self.memory.decay:  # [B, 1]: with the last finished chunk; nothing where it made no update
            forgotten = self.memory.decay * (state["scale"] != 0).to(key)[:, None]  # [B] -> [B, 1]
        given, slices = self._recall(state, key, columns, folded, forgotten)
        self._fold(state["delta"], channels, slices, forgotten)

        if updated is not None:
            key = torch.where(updated[:, None], key, 0)  # [B, 1] over [B, h]
        sums = self._filtered(state, target, conv)  # [B, K, d + 1]
        window = sums[:, : len(self.window)]  # [B, R + 1, d + 1]
        if self.memory.update_rule != "hebbian":
            window[:, -1, :-1].sub_(given)  # [B, d]: the token's own value
            finite = finite & (given.abs().amax(-1) < self.limit)
        values = window[..., :-1] * window[..., -1:]  # [B, R + 1, d]
        ends = done[:, 0].bool()  # [B, 1] -> [B]
        if ridge is not None:
            root = target[:, -1:]  # [B, 1]: of the write strength
            key, values = self._solve(state, key * root, values, ridge.to(key), ends, active)
        sources = sources.reshape(-1)  # [B, m] -> [B m]
        _write(state["keys"], sources, key_slots, key[:, None])  # [B, 1, h]
        _write(state["values"], sources, value_slots, values)

        _advance(state["open"], sums[:, 1:], ends, active)  # [B, K - 1, d + 1]
        nonfinite = ~finite if active is None else active > finite  # [B]
        scale = None
        if self.memory.clip is not None:
            scale = self._clip(state, value_slots, values, cast(projection, torch.float64), ends, active)
        _count(state, nonfinite, active, updated, scale, ends)
        state["position"].copy_(following[:, 0])  # [B, 1] -> [B]
        if success is not None:
            given = given * _gate(success, state, given, target, active)
        return (given @ projection)[:, None]  # [B, d] -> [B, 1, d]

    def _filtered(self, state: BlockState, target: Tensor, conv: Tensor) -> Tensor:
        """``[B, K, d + 1]``: the filter's sums and the rates of the tokens it reaches, this token among them.

        ``target [B, d + 1]``, with the rate. The first R + 1 are of the window; the last of those is this token, whose
        rate is known now.
        """
        sums = torch.cat([state["open"], self.new_tail], dim=1)  # [B, K - 1, d + 1] and [B, 1, d + 1]
        taps = conv.reshape(-1).index_select(0, self.taps).view(self.memory.taps, -1)  # [d, 1, kernel] -> [K, d]
        sums[..., :-1].addcmul_(taps, target[:, None, :-1])  # [K, d] times [B, 1, d]
        window = sums[:, : len(self.window)]  # [B, R + 1, d + 1]
        if len(self.window) > 1:  # there are no tokens before the chunk's first
            before = state["position"][:, None] + self.window < 0  # [B, 1] and [R + 1] -> [B, R + 1]
            window.masked_fill_(before[..., None], 0)  # [B, R + 1, 1] over [B, R + 1, d + 1]
        window[:, -1, -1:].copy_(target[:, -1:])  # [B, 1]
        return sums

    def _recall(
        self, state: BlockState, query: Tensor, columns: Tensor, folded: Tensor, forgotten: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``[B, d]``, what the dense and the factored update give; ``[B, w, d]``, the slice to fold."""
        size = self.memory.schedule.chunk
        keys, delta = state["keys"][:, :size], state["delta"][:, :-1]  # [B, C, h] and [B, h, d]
        unfolded = self.channel >= folded  # [h] and [B, 1] -> [B, h]
        scale, values = state["scale"][:, None, None], state["values"][:, :size]  # [B, 1, 1] and [B, C, d]
        scores = torch.bmm(torch.where(unfolded, query, 0)[:, None], keys.mT).mul_(scale)  # [B, 1, C]
        part = keys.gather(2, columns[:, None].expand(-1, size, -1)).mul_(scale)  # [B, w] -> [B, C, w]
        kept = query
        if forgotten is not None:
            kept = torch.where(unfolded, (1 - forgotten) * query, query)  # [B, h]
        given = torch.bmm(kept[:, None], delta).baddbmm_(scores, values)  # [B, 1, d]
        return given[:, 0], torch.bmm(part.mT, values)

    def _fold(self, delta: Tensor, channels: Tensor, slices: Tensor, forgotten: Tensor | None) -> None:
        rows, index = delta.view(-1, delta.shape[-1]), channels.reshape(-1)
        if forgotten is not None:
            slices = slices - forgotten[:, None] * rows.index_select(0, index).view_as(slices)
        rows.index_add_(0, index, slices.reshape(-1, delta.shape[-1]))
        delta[:, -1].zero_()

    def _solve(
        self, state: BlockState, key: Tensor, errors: Tensor, ridge: Tensor, ends: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The token's row of Q ``[B, h]``, and those of Y ``[B, R + 1, d]`` of the window's tokens (corrections.py).

        ``key [B, h]`` of K' and ``errors [B, R + 1, d]`` of E'. A row of L is Q k', and its pivot what is left of
        k' . k' + l: each token needs the rows before it alone.
        """
        start, end = self.memory.schedule.staged, self.memory.schedule.staged + self.memory.schedule.chunk
        position = state["position"][:, None]  # [B] -> [B, 1]
        rows_q, rows_y = state["keys"][:, start:end], state["values"][:, start:end]  # [B, C, ...], in ``order``
        row = torch.bmm(rows_q, key[..., None])[..., 0]  # [B, C, h] and [B, h, 1] -> [B, C]
        row = torch.where(self.order < position, row, 0)  # [B, C]
        pivot = (key.square().sum(-1) + ridge - row.square().sum(-1)).clamp(min=ridge).sqrt()[:, None]  # [B] -> [B, 1]
        q = (key - torch.bmm(row[:, None], rows_q)[:, 0]) / pivot  # [B, 1, C] and [B, C, h] -> [B, h]
        own = self.token == position
        row = torch.where(own, pivot, row.index_select(1, self.slot))  # [B, C], by token
        factor = torch.where(own[..., None], row[:, None], state["factor"])  # [B, C, 1] over [B, 1, C] and [B, C, C]
        index = (position + self.window).clamp(min=0)  # [B, R + 1]
        there = (position + self.window >= 0)[..., None]  # [B, R + 1, 1]
        rows = factor.gather(1, index[..., None].expand(-1, -1, factor.shape[-1]))  # [B, R + 1, C]
        settled = torch.where(there & (self.token < position + self.window[0])[:, None], rows, 0)  # [B, R + 1, C]
        rest = errors - torch.bmm(settled.index_select(2, self.order), rows_y)  # [B, R + 1, C] and [B, C, d]
        corner = rows.gather(2, index[:, None].expand(-1, len(self.window), -1))  # [B, R + 1, R + 1]
        corner = torch.where(there & there.mT, corner, self.eye)  # [B, R + 1, R + 1]
        found: list[Tensor] = []
        for i in range(len(self.window)):
            left = rest[:, i]  # [B, d]
            for j, y in enumerate(found):
                left = left - corner[:, i, j, None] * y  # [B, 1] times [B, d]
            found.append(left / corner[:, i, i, None])  # [B, d] over [B, 1]
        _advance(state["factor"], factor, ends, active)
        return q, torch.stack(found, dim=1)  # R + 1 times [B, d] -> [B, R + 1, d]

    def _clip(
        self, state: BlockState, slots: Tensor, values: Tensor, wide: Tensor, ends: Tensor, active: Tensor | None
    ) -> Tensor:
        """``[B]``: the scale of the chunk's update, if the chunk ended now; the norm so far goes into ``state``.

        ``slots [B, m + R + 1]``, the last of which are the window's; ``values [B, R + 1, d]``; ``wide`` is the
        projection in float64.
        """
        assert self.memory.clip is not None
        index = slots[:, -len(self.window) :].reshape(-1)  # [B, R + 1] -> [B (R + 1)]
        keys = state["keys"].view(-1, state["keys"].shape[-1]).index_select(0, index)  # [B slots, h] -> [B (R + 1), h]
        keys = keys.view(*values.shape[:2], -1)  # [B, R + 1, h]
        settled, whole = self._square(state, keys, values, wide)
        _advance(state["norm"], ops.norm_in_parts(settled, state["norm"].dtype), ends, active)
        return ops.clip_scale(whole, self.memory.clip).to(state["scale"])

    def _square(self, state: BlockState, keys: Tensor, values: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        """``[B]`` float64 twice: the unfinished update's squared norm over settled tokens, and if the chunk ended now.

        The terms of ``ops.squared_norm``, token by token. ``keys [B, R + 1, h]`` and ``values [B, R + 1, d]`` are those
        of the window; ``wide`` is the projection in float64.
        """
        start, end = self.memory.schedule.staged, self.memory.schedule.staged + self.memory.schedule.chunk
        # A pair of different tokens counts twice, with the later one; tokens that were not seen yet count nothing.
        weight = 1 + torch.sign((state["position"][:, None] + self.window)[..., None] - self.order)  # [B, R + 1, C]
        products = torch.bmm(keys.double(), state["keys"][:, start:end].double().mT)
        products *= torch.bmm(values.double() @ wide @ wide.mT, state["values"][:, start:end].double().mT)
        added = torch.where(weight > 0, products * weight, 0).sum(-1)  # [B, R + 1]
        settled = ops.square_of_parts(state["norm"]) + added[:, 0]
        return settled, settled + added[:, 1:].sum(-1)


def _gate(success: SuccessGate, state: BlockState, given: Tensor, target: Tensor, active: Tensor | None) -> Tensor:
    """``[B, 1]``: the success gate of the answer ``given [B, d]``; ``target [B, d + 1]`` with the rate."""
    known = GateState(state["answer"], state["scores"])
    answer, value = given[:, None], target[:, None, :-1]  # one head: [B, 1, d]
    return success.step(answer, value, known, active)[:, 0]


def _count(
    state: BlockState,
    nonfinite: Tensor,
    active: Tensor | None,
    updated: Tensor | None,
    clip_scale: Tensor | None,
    ends: Tensor,
) -> None:
    """Count ``nonfinite [B]`` tokens, and those that are ``active [B]`` and ``updated [B]``; None: all.

    Where the chunk ``ends [B]``, set the scale of its update.
    """
    masks = [mask for mask in (active, updated) if mask is not None]
    enabled = reduce(and_, masks) if masks else 1
    num_nonfinite, num_enabled = state["spoiled"] + nonfinite, state["enabled"] + enabled  # [B], as all below
    allowed = num_enabled > 0
    applied = (num_nonfinite == 0) & allowed
    scale = applied.to(state["scale"].dtype)
    if clip_scale is not None:
        scale = scale * clip_scale
        applied = scale != 0
    state["scale"].copy_(torch.where(ends, scale, state["scale"]))
    state["skipped"].add_((ends & allowed) > applied)
    state["spoiled"].copy_(num_nonfinite.masked_fill_(ends, 0))
    state["enabled"].copy_(num_enabled.masked_fill_(ends, 0))


def _write(tokens: Tensor, sources: Tensor, targets: Tensor, new: Tensor) -> None:
    """Move ``sources [B m]`` to the first m ``targets [B, m + n]`` and write ``new [B, n, any]`` to the others."""
    rows = tokens.view(-1, tokens.shape[-1])
    moving = rows.index_select(0, sources).view(tokens.shape[0], -1, tokens.shape[-1])
    rows.index_copy_(0, targets.reshape(-1), torch.cat([moving, new], dim=1).flatten(0, 1))
    tokens[:, -1].zero_()


def _advance(state: Tensor, new: Tensor, ends: Tensor, active: Tensor | None) -> None:
    """Write ``new [B, ...]`` to a part of the state that starts at zero in every chunk."""
    if active is not None:
        new = torch.where(row_mask(active, new), new, state)
    state.copy_(new.masked_fill(row_mask(ends, new), 0))
