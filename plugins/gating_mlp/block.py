"""In-place TTT: the down projection of the host's gated MLP is the fast weight.

h = act(gate x) * up x as in the host; the output is W_0 h (the host's own product, so that nothing changes at step 0)
plus what the updates of earlier chunks add. The block owns the target generator alone; W_0 is the host's.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width, K taps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo, SiteKind
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState, outlives_modes
from moshi_ttt.plugins.common import inner_curves
from moshi_ttt.plugins.common.finite import below, check_state_dtype, finite_tokens
from moshi_ttt.plugins.common.success_gate import GateState, SuccessGate, directions
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.compiled import CompiledStepper
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.corrections import (
    RIDGE,
    GramSum,
    RunningSum,
    Unfinished,
    corrected,
    ridge_of,
)
from moshi_ttt.plugins.gating_mlp.gram import gram
from moshi_ttt.plugins.gating_mlp.memory import HeardChunks, Memory
from moshi_ttt.plugins.gating_mlp.streaming import Stepper

INIT_STD = 0.02
RIDGE_STRENGTH = 2.0
"""Bias of the learned write strength with ``update: ridge``, at the start."""
Steppers = dict[tuple[int, torch.dtype, torch.device], Stepper | CompiledStepper]


class Heard(NamedTuple):
    """A call's tokens, as they ask, as they are remembered, and what they are told.

    Attributes:
        queries: ``[B, T, h]``, or with a state ``[B, N C, h]``.
        answers: ``[B, N C, d]``, before the projection; None where updates do not depend on them.
        target: ``[B, T, d]``, with the success gate.
    """

    queries: Tensor
    answers: Tensor | None
    target: Tensor | None
    chunks: HeardChunks


class GatingMLP(SequenceBlock):
    """Returns the MLP's output ``[B, T, d]`` without the residual."""

    scales_inner_lr = True
    scales_output = True
    skips_nonfinite = True
    kind: ClassVar[SiteKind] = SiteKind.FEED_FORWARD
    learned_state: ClassVar[bool] = False
    config: GatingMLPConfig

    def __init__(self, config: GatingMLPConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        if info.mlp is None:
            raise ConfigError(f"{info.site} has no gated MLP. Use a site whose feed-forward is one.")
        for part in (info.mlp.linear_in, info.mlp.linear_out):
            if not all(parameter.is_floating_point() for parameter in part.parameters()):
                raise ConfigError(
                    f"{info.site}: its {type(part).__name__} is quantised, and nothing can be learned on top of that. "
                    "Load the model unquantised."
                )
        check_state_dtype(info, roles)
        if config.update == "ridge" and roles.state not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{info.site}: update: ridge solves a system in the state's dtype, which policy {roles.policy!r} makes "
                f"{roles.state}. Use a policy whose state is float32 (fp32_state), or another update."
            )
        self.needs_input_embeddings = config.target == "input_embed"
        self.chunk = info.tokens(config.chunk)
        if config.start == "next_frame" and self.chunk < 2:
            raise ConfigError(
                f"{info.site}: start: next_frame, and a chunk of {config.chunk} is one token: the filter does not see "
                "the next. Take a longer chunk, or start: published."
            )
        self.memory = Memory.planned(
            chunk=self.chunk, hidden=self.hidden_width, width=info.dim, kernel=config.conv_kernel,
            padding=config.padding, decay=config.decay, clip=config.clip, update=config.update,
            gated=config.success_gate,
        )  # fmt: skip
        device, dtype, dim = info.device, roles.master, info.dim
        self.conv = nn.Parameter(torch.empty(dim, 1, config.conv_kernel, device=device, dtype=dtype))
        self.projection = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        if config.learned_lr:
            self.lr_weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            self.lr_bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        if config.update == "ridge":
            self.log_ridge = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.success = SuccessGate(1, device=device, dtype=dtype) if config.success_gate else None
        if config.train_w_down:
            # What is trained is the change: the host's own weight stays as it is, for removal, LoRA and a later load.
            self.w_down_change = nn.Parameter(torch.empty(dim, self.hidden_width, device=device, dtype=dtype))
        self._warned = False
        # Constants of a step for each shape of state that was allocated. Kept: a captured graph goes on reading them.
        self._steppers: Steppers = {}
        self._make_stepper: Callable[[Memory, Tensor], Stepper | CompiledStepper] = Stepper

    @property
    def causal(self) -> bool:
        return True

    @property
    def hidden_width(self) -> int:
        """h: half of what the input projection makes."""
        assert self.info.mlp is not None
        return _out_features(self.info.mlp.linear_in) // 2

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for parameter in self.parameters():
            assign(parameter, torch.zeros(parameter.shape))
        if self.config.start == "published":
            assign(self.projection, torch.diag(torch.randn(self.info.dim, generator=generator) * INIT_STD))
        else:
            conv = torch.zeros(self.conv.shape)
            conv[:, 0, ops.left_padding(self.config.conv_kernel, self.config.padding) + 1] = 1
            assign(self.conv, conv)
        if self.config.update == "ridge":
            assign(self.log_ridge, torch.full((1,), math.log(RIDGE)))
            if self.config.learned_lr:
                assign(self.lr_bias, torch.full((1,), RIDGE_STRENGTH))
        if self.success is not None:
            self.success.reset_parameters()

    def gate_parameters(self) -> list[nn.Parameter]:
        return [] if self.success is None else [self.success.bias, self.success.slope]

    def reset_unsaved(self, generator: torch.Generator | None = None) -> None:
        if type(self).reset_parameters is not GatingMLP.reset_parameters:  # a subclass sets more than nothing
            super().reset_unsaved(generator)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        return self.memory.initial(batch_size, self.roles.state, device or self.conv.device)

    def allocate_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        state = super().allocate_state(batch_size, device)
        self._stepper_for(state)
        return state

    def accumulated_update(self, state: BlockState) -> Tensor:
        """``[B, d, h]``: what the finished chunks have added to W_0."""
        update = self.projection.to(self.roles.state).mT @ self.memory.update(state).mT
        return update if self.config.read_scale == 1 else self.config.read_scale * update

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        layout = self.info.format.chunks(x, self.chunk, None if state is None else state["position"])
        if state is None and not context.want_state and x.shape[1] <= self.chunk:
            self._warn_short(x.shape[1])
        hidden, base = self._host_mlp(x, context)
        start = None
        if state is not None:
            learned = any(tensor.requires_grad for tensor in state.values())
            with torch.set_grad_enabled(torch.is_grad_enabled() and learned):
                start = self.memory.update(state)
        heard = self._heard(layout, hidden, x, state, context, start)
        answers = self._summed(heard, start, hidden.shape[-1]) if heard.answers is None else heard.answers
        if state is not None:
            answers = layout.merge(answers.unflatten(1, (-1, self.chunk)))
        answers = answers[:, : x.shape[1]]
        gate, gated = self._success(answers, heard.target, state)
        y = self.at_volume(base, self._read(answers, gate, self.projection.to(answers)), context)
        if not context.want_state:
            return y, {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not context.detach_state):
            after = self.memory.after(state or self.init_state(x.shape[0], x.device), heard.chunks)
        return y, {**after, **gated}

    def _summed(self, heard: Heard, start: Tensor | None, hidden: int) -> Tensor:
        """``[B, T, d]``: the answers of ``update: hebbian``, all chunks at once where that pays."""
        queries, chunks = heard.queries, heard.chunks
        values = chunks.values if self.config.clip is None else chunks.values * chunks.scale[..., None, None]
        length, width = queries.shape[1], values.shape[-1]
        form = gram if ops.prefers_gram(values.shape[1] * self.chunk, width, hidden) else ops.running_sum
        return form(
            queries, values.flatten(1, 2)[:, :length], start, chunks.complete, chunks.scale != 0, self.config.decay,
            self.chunk,
        )  # fmt: skip

    def _success(
        self, answers: Tensor, target: Tensor | None, state: BlockState | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The gate ``[B, T, 1]`` of ``answers`` and ``target [B, T, d]``, None without one, and its state.

        The answer to a token is about its value, the (filtered) next target: what has come by the next token.
        """
        if self.success is None or target is None:
            return None, {}
        before = None if state is None else GateState(state["answer"], state["scores"])
        gate, after = self.success(answers[:, :, None], target[:, :, None], before)
        return gate[:, :, 0], after._asdict()

    def _read(self, answers: Tensor, gate: Tensor | None, projection: Tensor) -> Tensor:
        """What ``answers [B, T, d]`` add to the output."""
        if gate is not None:
            answers = answers * gate
        read = answers @ projection
        return read if self.config.read_scale == 1 else self.config.read_scale * read

    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        if self._autocast_is_on(x):
            with self._without_autocast(x):  # only where needed: entering costs as much as a product
                return self.step(x, state, context)
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)
        if tokens.shape[1] != 1 or context.reset is not None:
            return super().step(x, state, context)
        self._check_call(tokens, state, context)
        hidden, base = self._host_mlp(tokens, context)
        token = self._token(hidden, tokens, context)
        conv, projection = (context.cast(part, token[0].dtype) for part in (self.conv, self.projection))
        stepper = self._stepper_for(state)
        masks = context.exec_mask, context.updates_mask(tokens)
        ridge = ridge_of(self.log_ridge) if self.config.update == "ridge" else None
        added = stepper.step(state, token, conv, projection, *masks, context.cast, ridge=ridge, success=self.success)
        added = added if self.config.read_scale == 1 else self.config.read_scale * added
        return self.info.format.from_tokens(self.at_volume(base, added, context), x)

    def compile_step(self) -> None:
        CompiledStepper(self.memory, torch.empty(0, dtype=self.roles.state, device=self.conv.device))
        self._make_stepper = CompiledStepper
        self._steppers = {}

    def _hidden(self, x: Tensor) -> Tensor:
        """``[B, T, h]``: the host's hidden activation, by the same operations in training and in streams."""
        mlp = self.info.mlp
        assert mlp is not None
        gate, up = mlp.linear_in(x).unflatten(-1, (2, -1)).unbind(-2)
        hidden: Tensor = mlp.activation(gate) * up
        return hidden

    def _host_mlp(self, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor]:
        """The hidden activation ``[B, T, h]``, and the output ``[B, T, d]`` of W_0, with its learned change at volume.

        W_0 h is bit for bit what the host itself computes. Where it computes its MLP as one compiled function, that
        does not give h away: then the product of ``linear_in`` is made twice.
        """
        mlp, own = self.info.mlp, self.info.mlp_output
        assert mlp is not None
        hidden = self._hidden(x)
        base = None if own is None else own(mlp, x)
        if base is None:
            base = mlp.linear_out(hidden)
        if self.config.train_w_down:
            change = F.linear(_or_zero(hidden), context.cast(self.w_down_change, hidden.dtype))
            base = self.at_volume(base, change, context)
        return hidden, base

    def _token(self, hidden: Tensor, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """Key ``[B, T, h]``, target ``[B, T, d]`` and rate ``[B, T, 1]`` of each token."""
        source = context.input_embeddings if self.config.target == "input_embed" else x
        assert source is not None
        key, target = hidden.to(self.roles.state), source.to(self.roles.state)
        if self.config.keys == "unit":
            key = directions(key)
        if self.config.target_norm:
            target = directions(target) * math.sqrt(target.shape[-1])
        return key, target, context.where_updated(self._rate(x))

    def _rate(self, x: Tensor) -> Tensor:
        """``[B, T, 1]``: the write strength of each token, with ``update: ridge`` its root, in the state's dtype."""
        ridge = self.config.update == "ridge"
        if not self.config.learned_lr:
            rate = self.inner_lr_factor * self.config.lr
            rate = math.sqrt(rate) if ridge else rate
            return x.new_full((x.shape[0], x.shape[1], 1), rate, dtype=self.roles.state)
        wide = _or_zero(x).to(self.roles.compute)
        score = (wide * self.lr_weight.to(wide)).sum(-1, keepdim=True) + self.lr_bias.to(wide)
        if ridge:  # the root of a sigmoid, whose slope is finite where the sigmoid is 0
            root = math.sqrt(self.inner_lr_factor * self.config.lr)
            return (root * torch.exp(0.5 * F.logsigmoid(score))).to(self.roles.state)
        most = self.config.lr * (2 if self.config.update == "hebbian" else 1)
        return (self.inner_lr_factor * most * torch.sigmoid(score)).to(self.roles.state)

    def _heard(
        self, layout: ChunkLayout, hidden: Tensor, x: Tensor, state: BlockState | None, context: BlockContext,
        start: Tensor | None,
    ) -> Heard:  # fmt: skip
        """The call's tokens, after the accumulated update ``start [B, h, d]``."""
        size, (batch, length) = self.chunk, x.shape[:2]
        keys, target, rate = self._token(hidden, x, context)
        finite = finite_tokens(keys, target, rate)[..., None]  # [B, T, 1]
        spoiled = layout.split((~finite).to(keys.dtype)).sum((2, 3)).long()
        # A key that is not finite would spoil gradients that are summed over tokens, however it is masked after this.
        keys = torch.where(finite, keys, 0)
        target, rate = torch.where(finite, target, 0), torch.where(finite, rate, 0)
        known, strength = None if self.success is None else target, rate
        target, rate = layout.split(target), layout.split(rate)
        queries = keys if state is None else layout.split(keys).flatten(1, 2)
        remembered = list(keys.split(size, 1))
        if context.want_state or state is not None:
            remembered = list(layout.split(context.where_updated(keys)).unbind(1))
        if self.config.update != "hebbian":
            written = keys * strength if self.config.update == "ridge" else context.where_updated(keys)
            remembered = list(layout.split(written).unbind(1))
        beyond = self.memory.taps if context.want_state else 0
        sums = ops.filtered(target, self._reaching().to(target), self.memory.left, beyond)
        rate = F.pad(rate, (0, 0, 0, beyond))
        come, first = x.new_full((batch,), length, dtype=torch.int64), None
        if state is not None:
            come = come + state["position"]
            opened = self.memory.open_tokens(state)[:, : size + beyond]
            sums = torch.cat([(sums[:, 0] + opened[..., :-1])[:, None], sums[:, 1:]], dim=1)
            rate = torch.cat([(rate[:, 0] + opened[..., -1:])[:, None], rate[:, 1:]], dim=1)
            first = self.memory.unfinished(state)
            spoiled = torch.cat([spoiled[:, :1] + state["spoiled"][:, None], spoiled[:, 1:]], dim=1)
        ends = size * torch.arange(1, layout.num_chunks + 1, device=x.device)
        complete = come[:, None] >= ends
        if self.config.update != "hebbian":
            if state is None:
                queries = layout.split(queries).flatten(1, 2)
            return self._corrected(
                queries, remembered, sums, rate, spoiled, complete, come, first, start, known, context
            )
        values = (sums * rate)[:, :, :size]
        if first is not None:
            earlier, settled = first.earlier[..., None], first.settled[..., None]
            queries = torch.cat([torch.where(earlier, first.keys, queries[:, :size]), queries[:, size:]], dim=1)
            remembered[0] = torch.where(earlier, first.keys, remembered[0])
            values = torch.cat([torch.where(settled, first.values, values[:, 0])[:, None], values[:, 1:]], dim=1)
        scale, squares = (spoiled == 0).to(values.dtype), None
        if self.config.clip is not None:
            squares = self._squares(remembered, values.double() @ context.cast(self.projection, torch.float64))
            scale = scale * ops.clip_scale(squares.sum(-1), self.config.clip).to(scale)
        heard = HeardChunks(
            keys=remembered, values=values, open=torch.cat([sums, rate], dim=-1), complete=complete,
            spoiled=spoiled, scale=scale, squares=squares, come=come,
        )  # fmt: skip
        return Heard(queries, None, known, heard)

    def _corrected(
        self, queries: Tensor, keys: list[Tensor], sums: Tensor, rate: Tensor, spoiled: Tensor, complete: Tensor,
        come: Tensor, first: Unfinished | None, start: Tensor | None, known: Tensor | None, context: BlockContext,
    ) -> Heard:  # fmt: skip
        """``_heard`` where a chunk's update depends on what the memory answers to it."""
        config, (width, hidden) = self.config, (sums.shape[-1], queries.shape[-1])
        memory: GramSum | RunningSum
        if ops.prefers_gram(queries.shape[1], width, hidden):
            memory = GramSum(start, config.decay)
        else:
            start = queries.new_zeros(queries.shape[0], hidden, width) if start is None else start
            memory = RunningSum(start, config.decay)
        found = corrected(
            memory, queries.unflatten(1, (-1, self.chunk)), keys, sums, rate, spoiled, complete, first,
            ridge_of(self.log_ridge) if config.update == "ridge" else None,
            None if config.clip is None else (config.clip, context.cast(self.projection, torch.float64)),
        )  # fmt: skip
        chunks = HeardChunks(
            keys=found.keys, values=torch.stack(found.values, dim=1),
            open=torch.cat([torch.stack(found.open, dim=1), rate], dim=-1), complete=complete,
            spoiled=torch.stack(found.spoiled, dim=1), scale=torch.stack(found.scales, dim=1), come=come,
            factors=found.factors,
            squares=torch.stack(found.squares, dim=1) if found.squares else None,
        )  # fmt: skip
        return Heard(queries, torch.cat(found.answers, dim=1), known, chunks)

    def _squares(self, keys: list[Tensor], values: Tensor) -> Tensor:
        """``[B, N, C]`` float64: what each token adds to the squared norm of its chunk's update.

        ``keys`` N times ``[B, C, h]`` (fewer tokens in the last), ``values [B, N, C, d]``, projected.
        """
        squares = [ops.squared_norm(k, v[:, : k.shape[1]]) for k, v in zip(keys, values.unbind(1), strict=True)]
        short = values.shape[2] - squares[-1].shape[1]
        return torch.stack([*squares[:-1], F.pad(squares[-1], (0, short))], dim=1)

    def _reaching(self) -> Tensor:
        """``[d, 1, K]``: the filter's taps that can reach a token of the same chunk."""
        return self.conv[..., self.memory.first_tap : self.memory.first_tap + self.memory.taps]

    def _stepper_for(self, state: BlockState) -> Stepper | CompiledStepper:
        like = state["delta"]
        key = (like.shape[0], like.dtype, like.device)
        if type(like) is Tensor and key in self._steppers:
            return self._steppers[key]
        with torch.inference_mode(False):
            stepper = self._make_stepper(self.memory, like)
        if outlives_modes(like):
            self._steppers[key] = stepper
        return stepper

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own constants: these may be compiled code, and belong to this process.
        return {**super().__getstate__(), "_steppers": {}}

    def _warn_short(self, length: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"gating_mlp at {self.info.site}: a sequence of {length} tokens is not longer than one chunk of "
                f"{self.chunk}, so no update can take effect in it. Lower chunk, or train on longer sequences.",
                stacklevel=2,
            )

    @torch.no_grad()
    def drift(self, state: BlockState) -> Tensor:
        """``[B]`` float64: norm of each stream's accumulated update over that of the host's own W_0 and its LoRA."""
        assert self.info.mlp is not None
        parts = [_norms(parameter.flatten()) for parameter in self.info.mlp.linear_out.parameters()]
        return _norms(self.accumulated_update(state).flatten(1)) / _norms(torch.stack(parts))

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        hidden = self._hidden(x)
        key, target, rate = self._token(hidden, x, context)
        finite = finite_tokens(key, target, rate)
        return {
            "key_norm": key.norm(dim=-1).max(),
            "target_norm": target.norm(dim=-1).max(),
            "rate": rate.max().square() if self.config.update == "ridge" else rate.max(),
            "nonfinite_tokens": (~finite).float().mean(),
            "filter": self.conv.abs().max(),
        }

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """1/2 || D h_t - v_t ||^2: the accumulated update D, without W_0, as a predictor of the target v_t. One head.

        With ``update: hebbian`` a diagnostic, not what is minimised: it adds v_t h_t^T and reconstructs nothing. The
        other updates minimise it, before the projection. D is zero initially.
        A sequence's end ends its last chunk for the filter, which may look ahead.
        """
        context = replace(context, want_state=True)
        with self._without_autocast(x):
            layout = self.info.format.chunks(x, self.chunk)
            hidden = self._hidden(x)
            heard = self._heard(layout, hidden, x, None, context, None)
            queries, chunks = heard.queries[:, : x.shape[1]], heard.chunks
            projection = self.projection.to(queries)
            target = layout.merge(chunks.open[:, :, : self.chunk, :-1])
            if heard.answers is not None:  # what was subtracted is added again
                projection = torch.eye(x.shape[-1], dtype=queries.dtype, device=queries.device)
                target = target + heard.answers[:, : x.shape[1]]
            target = target @ projection
            start = delta = queries.new_zeros(x.shape[0], queries.shape[-1], x.shape[-1])
            found: dict[str, list[Tensor]] = {"initial": [], "before": [], "after": []}
            for n, asked in enumerate(queries.split(self.chunk, 1)):
                scale = chunks.scale[:, n]
                values = chunks.values[:, n] * scale[:, None, None]
                found["initial"].append(asked @ start @ projection)
                found["before"].append(asked @ delta @ projection)
                if asked.shape[1] == self.chunk:
                    ended = chunks.complete[:, n]
                    delta = ops.after_chunk(delta, chunks.keys[n], values, ended, scale != 0, self.config.decay)
                    found["after"].append(asked @ delta @ projection)
            by_head = {name: [chunk[:, None] for chunk in chunks] for name, chunks in found.items()}
            return inner_curves.curves(target[:, None], by_head)

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        if figures["nonfinite_tokens"] > 0:
            return [
                f"{figures['nonfinite_tokens']:.1%} of the tokens are not finite or too large, so the updates of their "
                "chunks are skipped: lower lr, or look at the input."
            ]
        return []

    def cast_bytes(self) -> int:
        # The compiled step casts in registers: with it the copy for the clip is made by calls of several tokens alone.
        total = copy_bytes([self.conv, self.projection], self.roles.state)
        if self.config.clip is not None and self.projection.dtype == self.roles.state:
            total += copy_bytes([self.projection], torch.float64)
        return total + (copy_bytes([self.w_down_change], self.info.dtype) if self.config.train_w_down else 0)

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    def flops_per_token(self) -> int:
        dim, hidden, schedule = self.info.dim, self.hidden_width, self.memory.schedule
        recall = hidden * dim + schedule.chunk * (hidden + dim)
        fold, value = schedule.slice * schedule.chunk * dim, (1 + schedule.look_ahead) * self.memory.taps * dim
        clip = 0
        if self.config.clip is not None:
            clip = (1 + schedule.look_ahead) * (schedule.chunk * (hidden + dim) + dim * dim)
        learned = dim * hidden if self.config.train_w_down else 0
        solve = 0
        if self.config.update == "ridge":  # a row of Q, and of Y for each token whose value is not settled
            solve = schedule.chunk * (2 * hidden + (1 + schedule.look_ahead) * dim)
        return 2 * (recall + dim * dim + fold + value + clip + learned + solve)


def _or_zero(x: Tensor) -> Tensor:
    """``x [B, T, any]`` with zeros for tokens that are not finite: nothing of them enters a gradient of a parameter."""
    with torch.no_grad():
        finite = below(x, float("inf"))[..., None]
    return torch.where(finite, x, 0)


def _norms(rows: Tensor) -> Tensor:
    """Norms over the last dimension, summed in float64 without a copy in it."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms


def _out_features(linear: nn.Module) -> int:
    width = getattr(linear, "out_features", None)
    if not isinstance(width, int):
        raise ConfigError(f"{type(linear).__name__} does not say its out_features, so it cannot hold a fast weight.")
    return width
