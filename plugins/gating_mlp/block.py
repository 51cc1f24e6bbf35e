"""In-place TTT: the down projection of the host's gated MLP is the fast weight.

h = act(gate x) * up x as in the host; the output is W_0 h (the host's own product, so that nothing changes at step 0)
plus what the updates of earlier chunks add. The block owns the target generator alone; W_0 is the host's.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width, K taps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core import autocast
from moshi_ttt.core.block import BlockContext, SiteInfo, SiteKind
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.gated_mlp import hidden_width, output_projection, require_gated_mlp
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState, outlives_modes
from moshi_ttt.core.state_ranges import StateRange
from moshi_ttt.plugins.common.backend_options import step_backend
from moshi_ttt.plugins.common.block_backends import BlockWithCompiledStep
from moshi_ttt.plugins.common.finite import or_zero
from moshi_ttt.plugins.common.success_gate import GateState, SuccessGate, directions
from moshi_ttt.plugins.gating_mlp import diagnostics, ops
from moshi_ttt.plugins.gating_mlp.backends import STEP, MakesStepper
from moshi_ttt.plugins.gating_mlp.checks import check_mlp, check_options
from moshi_ttt.plugins.gating_mlp.chunk import CallTokens, ChunkForm
from moshi_ttt.plugins.gating_mlp.compiled import CompiledStepper
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.corrections import RIDGE, ridge_of
from moshi_ttt.plugins.gating_mlp.hidden import hidden_activation
from moshi_ttt.plugins.gating_mlp.memory import Memory, upgraded
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper

INIT_STD = 0.02
RIDGE_STRENGTH = 2.0
"""Initial bias of the learned write strength with ``update: ridge``."""
Steppers = dict[tuple[int, torch.dtype, torch.device, MakesStepper], Stepper | CompiledStepper]


class GatingMLP(BlockWithCompiledStep):
    """Returns the MLP's output ``[B, T, d]`` without the residual.

    A token that is not finite, or too large, is left out with the update of its whole chunk.
    """

    scales_inner_lr = True
    scales_output = True
    skips_nonfinite = True
    kind: ClassVar[SiteKind] = SiteKind.FEED_FORWARD
    learned_state: ClassVar[bool] = False
    operations = (STEP,)
    config: GatingMLPConfig

    def __init__(self, config: GatingMLPConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        mlp = require_gated_mlp(info.mlp, info.site)
        check_mlp(mlp, info)
        self.needs_input_embeddings = config.target == "input_embed"
        self.chunk = info.tokens(config.chunk)
        check_options(config, info, roles, self.chunk)
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
        # Constants of a step for each shape of state that was allocated. Kept: a captured graph continues to read them.
        self._steppers: Steppers = {}
        self._ask({"step": step_backend(config.backend)})

    @property
    def causal(self) -> bool:
        return True

    @property
    def hidden_width(self) -> int:
        """h, of the host's MLP."""
        assert self.info.mlp is not None
        return hidden_width(self.info.mlp)

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

    def upgrade_state(self, state: Mapping[str, Tensor]) -> BlockState:
        return upgraded(state)

    def accumulated_update(self, state: BlockState) -> Tensor:
        """``[B, d, h]``: what the finished chunks have added to W_0."""
        with self._without_autocast(state["delta"]):
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
        form = self._form()
        tokens = form.tokens(*self._token(hidden, x, context), layout, state, context, start)
        answers = form.answers(tokens, start)
        if state is not None:
            answers = layout.merge(answers.unflatten(1, (-1, self.chunk)))  # [B, N C, d] -> [B, N, C, d] -> [B, T, d]
        answers = answers[:, : x.shape[1]]
        gate, gated = self._success(answers, tokens.target, state)
        y = self._with_answers(
            base, answers, gate, context, after=0 if state is not None else min(self.chunk, x.shape[1])
        )
        if not context.want_state:
            return y, {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not context.detach_state):
            after = self.memory.after(state or self.init_state(x.shape[0], x.device), tokens.chunks)
        return y, {**after, **gated}

    def _form(self) -> ChunkForm:
        """The chunk form, with this block's parameters."""
        ridge = ridge_of(self.log_ridge) if self.config.update == "ridge" else None
        return ChunkForm(self.memory, self.conv, self.projection, ridge)

    def _success(
        self, answers: Tensor, target: Tensor | None, state: BlockState | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The gate ``[B, T, 1]`` of ``answers`` and ``target [B, T, d]``, None without one, and its state.

        The answer to a token predicts its value, the (filtered) next target, which is known at the next token.
        """
        if self.success is None or target is None:
            return None, {}
        before = None if state is None else GateState(state["answer"], state["scores"])
        gate, after = self.success(answers[:, :, None], target[:, :, None], before)  # [B, T, d] -> [B, T, 1, d]
        return gate[:, :, 0], after._asdict()

    def _with_answers(
        self, base: Tensor, answers: Tensor, gate: Tensor | None, context: BlockContext, *, after: int
    ) -> Tensor:
        """``base [B, T, d]``, and from token ``after`` on what ``answers [B, T, d]``, times the ``gate``, add to it."""
        alone, changed = base.split([after, base.shape[1] - after], dim=1)
        read = self._read(answers[:, after:], None if gate is None else gate[:, after:], self.projection.to(answers))
        changed = self.at_volume(changed, read, context)
        return torch.cat([alone, changed], dim=1) if after else changed

    def _read(self, answers: Tensor, gate: Tensor | None, projection: Tensor) -> Tensor:
        """What ``answers [B, T, d]``, times the ``gate [B, T, 1]``, add to the output: ``[B, T, d]``."""
        if gate is not None:
            answers = answers * gate
        read = answers @ projection
        return read if self.config.read_scale == 1 else self.config.read_scale * read

    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        if autocast.is_on(x):
            with self._without_autocast(x):  # only where needed: entering costs as much as a product
                return self.step(x, state, context)
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)
        if tokens.shape[1] != 1 or context.reset is not None:
            return super().step(x, state, context)
        self._check_call(tokens, state, context)
        hidden, base = self._host_mlp(tokens, context)
        token = self._token(hidden.to(self.roles.state), tokens, context)
        conv, projection = (context.cast(part, token[0].dtype) for part in (self.conv, self.projection))
        stepper = self._stepper_for(state)
        masks = context.exec_mask, context.updates_mask(tokens)
        ridge = ridge_of(self.log_ridge) if self.config.update == "ridge" else None
        added = stepper.step(state, token, conv, projection, *masks, context.cast, ridge=ridge, success=self.success)
        added = added if self.config.read_scale == 1 else self.config.read_scale * added
        return self.info.format.from_tokens(self.at_volume(base, added, context), x)

    def _state_numbers(self) -> int:
        return self.hidden_width * self.info.dim + self.chunk * (self.hidden_width + self.info.dim)

    def _hidden(self, x: Tensor) -> Tensor:
        """``[B, T, h]``: the host's hidden activation, by the same operations in training and in streams."""
        mlp = self.info.mlp
        assert mlp is not None
        return hidden_activation(mlp, x)

    def _host_mlp(self, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor]:
        """The hidden activation ``[B, T, h]``, and the output ``[B, T, d]`` of W_0, with its learned change at volume.

        W_0 h is bit for bit what the host itself computes. Where it computes its MLP as one compiled function, that
        does not give h away: then the input projection is computed twice.
        """
        mlp, own = self.info.mlp, self.info.mlp_output
        assert mlp is not None
        hidden = self._hidden(x)
        base = None if own is None else own(mlp, x)
        if base is None:
            base = output_projection(mlp)(hidden)
        if self.config.train_w_down:
            change = F.linear(or_zero(hidden), context.cast(self.w_down_change, hidden.dtype))
            base = self.at_volume(base, change, context)
        return hidden, base

    def _token(self, hidden: Tensor, x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
        """Key ``[B, T, h]``, target ``[B, T, d]`` and rate ``[B, T, 1]``; a key that is ``hidden`` in its own dtype."""
        source = context.input_embeddings if self.config.target == "input_embed" else x
        assert source is not None
        key = directions(hidden.to(self.roles.state)) if self.config.keys == "unit" else hidden
        target = source.to(self.roles.state)
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
        wide = or_zero(x).to(self.roles.compute)
        score = (wide * self.lr_weight.to(wide)).sum(-1, keepdim=True) + self.lr_bias.to(wide)
        if ridge:  # the root of a sigmoid, whose slope is finite where the sigmoid is 0
            root = math.sqrt(self.inner_lr_factor * self.config.lr)
            return (root * torch.exp(0.5 * F.logsigmoid(score))).to(self.roles.state)
        most = self.config.lr * (2 if self.config.update == "hebbian" else 1)
        return (self.inner_lr_factor * most * torch.sigmoid(score)).to(self.roles.state)

    def _stepper_for(self, state: BlockState) -> Stepper | CompiledStepper:
        like = state["delta"]
        make: MakesStepper = self._backend_run("step", like.device)
        key = (like.shape[0], like.dtype, like.device, make)
        if type(like) is Tensor and key in self._steppers:
            return self._steppers[key]
        with torch.inference_mode(False):
            stepper = make(self.memory, like)
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
        return diagnostics.drift(self.accumulated_update(state), self.info.mlp)

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        hidden = self._hidden(x)
        key, target, rate = self._token(hidden.to(self.roles.state), x, context)
        strength = rate.square() if self.config.update == "ridge" else rate
        return diagnostics.figures(key, target, rate, strength, self.conv)

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """1/2 || D h_t - v_t ||^2 per token, one head: see ``diagnostics.inner_loss_curves``."""
        return diagnostics.inner_loss_curves(*self._from_start(x, context), self.memory, self.projection)

    @torch.no_grad()
    def recent_losses(self, x: Tensor, state: BlockState, context: BlockContext) -> Tensor:
        return diagnostics.losses_at(
            *self._from_start(x, context), self.memory, self.projection, self.memory.update(state)
        )

    def _from_start(self, x: Tensor, context: BlockContext) -> tuple[CallTokens, ChunkLayout]:
        """The tokens ``x [B, T, d]`` of a sequence from its beginning, and how they lie in chunks."""
        context = replace(context, want_state=True)
        layout = self.info.format.chunks(x, self.chunk)
        return self._form().tokens(*self._token(self._hidden(x), x, context), layout, None, context, None), layout

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        return diagnostics.red_flags(figures)

    def cast_bytes(self) -> int:
        # The compiled step casts in registers: with it the copy for the clip is made by calls of several tokens alone.
        total = copy_bytes([self.conv, self.projection], self.roles.state)
        if self.config.clip is not None and self.projection.dtype == self.roles.state:
            total += copy_bytes([self.projection], torch.float64)
        return total + (copy_bytes([self.w_down_change], self.info.dtype) if self.config.train_w_down else 0)

    def state_ranges(self) -> Mapping[str, StateRange]:
        return self.memory.ranges()

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    @property
    def chunk_tokens(self) -> int:
        return self.chunk

    def flops_per_token(self) -> int:
        learned = self.info.dim * self.hidden_width if self.config.train_w_down else 0
        return self.memory.flops_per_token() + 2 * learned
