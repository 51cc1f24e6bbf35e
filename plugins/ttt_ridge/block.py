"""The block of ``ttt_ridge``: its parameters, its state, and the calls that every block answers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SiteInfo
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState
from moshi_ttt.core.state_ranges import StateRange
from moshi_ttt.plugins.common import short_conv
from moshi_ttt.plugins.common.backend_options import step_backend
from moshi_ttt.plugins.common.block_backends import BlockWithCompiledStep
from moshi_ttt.plugins.common.finite import check_state_dtype
from moshi_ttt.plugins.common.projection import INIT_STD, Projection
from moshi_ttt.plugins.common.success_gate import GateState, SuccessGate, initial_state
from moshi_ttt.plugins.ttt_ridge import layer, memory
from moshi_ttt.plugins.ttt_ridge.backends import STEP, RidgeStep
from moshi_ttt.plugins.ttt_ridge.chunk import chunk_ridge
from moshi_ttt.plugins.ttt_ridge.config import REGULARIZATION, TTTRidgeConfig

LARGEST_GROWTH = 1e3
NOVELTY_OFFSET, NOVELTY_SLOPE = 2.0, 4.0
VARIANCE_OFFSET, VARIANCE_SLOPE = -1.0, 1.0
VARIANCE_EPS = 1e-4
GATE_STATE = ("last_answer", "last_scores")
"""What the success gate keeps of a stream, as ``GateState`` has it."""


class TTTRidge(BlockWithCompiledStep):
    """A memory that holds the ridge solution of all earlier chunks, read by each token, beside the residual.

    A token that is not finite, or too large, is left out alone: the other tokens of its chunk are written.
    """

    config: TTTRidgeConfig
    learned_state = False
    scales_inner_lr = True
    skips_nonfinite = True
    skipped_advice = "Look at the host's activations and embeddings for tokens that are not finite, or too large."
    scales_output = True
    operations = (STEP,)

    gate: Tensor

    def __init__(self, config: TTTRidgeConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        check_state_dtype(info, roles)
        if torch.finfo(roles.state).bits < 32:
            raise ConfigError(
                f"{info.site}: policy {roles.policy!r} keeps the state in {roles.state}, and a least-squares solution "
                "needs the digits of float32. Use a policy whose state is float32, such as fp32_state."
            )
        if info.format.axes > 1:
            raise ConfigError(
                f"{info.site}: ttt_ridge remembers which token followed which, and tokens of a grid do not follow each "
                "other. Use ttt_linear or ttt_mlp there."
            )
        self.needs_input_embeddings = config.value == "embedding"
        self.chunk = info.tokens(config.chunk)
        self.heads, self.key_width, self.value_width = layer.widths(config, info)
        self.keep = 1.0 if config.decay == 0 else (1 - config.decay) ** (1 / self.chunk)
        # Each coordinate gets its prior back every key_width tokens: between, its variance grows by keep^-key_width.
        if (grows := -self.key_width * math.log(self.keep)) > math.log(LARGEST_GROWTH):
            raise ConfigError(
                f"{info.site}: with decay {config.decay:g}, chunk {self.chunk} and keys of {self.key_width} a variance "
                f"grows by 10^{grows / math.log(10):.1f} until its prior is back, and {LARGEST_GROWTH:g} is allowed: "
                "beyond, float32 has no digits left. Lower decay, raise chunk, or make key_width smaller."
            )
        device, dtype, heads, taps = info.device, roles.master, self.heads, config.conv_kernel
        keys, values = heads * self.key_width, heads * self.value_width

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.wqk, self.wo = Projection((keys, info.dim), device, dtype), Projection((info.dim, values), device, dtype)
        self.conv_q, self.conv_k = parameter(keys, taps), parameter(keys, taps)
        self.value_weight = parameter(values, info.dim)
        self.write = Projection((heads, info.dim), device, dtype)
        self.log_regularization = parameter(heads)
        alpha = parameter(info.dim if config.gate.alpha == "channel" else 1)
        if config.gate.alpha == "fixed":
            self.register_buffer("gate", alpha.detach(), persistent=False)
        else:
            self.gate = alpha
        if config.success_gate:
            self.success = SuccessGate(heads, device=device, dtype=dtype)
        if config.novelty:
            self.novelty_offset, self.novelty_slope = parameter(heads), parameter(heads)
        if config.variance_gate:
            self.variance_offset, self.variance_slope = parameter(heads), parameter(heads)
        self._ask({"step": step_backend(config.backend)})

    @property
    def causal(self) -> bool:
        return True

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        wide = self.info.dim**-0.5
        drawn = {"wqk.weight": wide, "value_weight": wide, "wo.weight": INIT_STD}
        constant = {
            "write.bias": 1.0, "log_regularization": math.log(self.config.regularization),
            "novelty_offset": NOVELTY_OFFSET, "novelty_slope": NOVELTY_SLOPE, "variance_offset": VARIANCE_OFFSET,
            "variance_slope": VARIANCE_SLOPE,
        }  # fmt: skip
        self.reset_unsaved()
        if self.config.success_gate:
            self.success.reset_parameters()
        for name, parameter in self.named_parameters():
            if name == "gate" or name.startswith("success."):
                continue
            if name in drawn:
                value = torch.randn(parameter.shape, generator=generator) * drawn[name]
            else:
                value = torch.full(parameter.shape, constant.get(name, 0.0), dtype=torch.float64)
            if name in ("conv_q", "conv_k"):  # queries of this token, keys of the one before
                channels, taps = parameter.shape
                value = short_conv.one_at_lag(channels, taps, lag=int(name == "conv_k"))
            assign(parameter, value)

    def reset_unsaved(self, generator: torch.Generator | None = None) -> None:
        assign(self.gate, torch.full(self.gate.shape, self.config.gate.init, dtype=torch.float64))

    def gate_parameters(self) -> list[nn.Parameter]:
        named = dict(self.named_parameters())
        gates = ("gate", "success.bias", "success.slope", "variance_offset", "variance_slope")
        return [named[name] for name in gates if name in named]

    # ---- state

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        like = torch.empty(0, device=device or self.gate.device, dtype=self.roles.state)
        decays, variance = self.keep != 1, self.config.variance_gate
        shape = (batch_size, self.heads, self.key_width, self.value_width)
        state = memory.initial_state(*shape, like, decays=decays, variance=variance)
        taps = self.config.conv_kernel
        channels = self.heads * self.key_width
        state["cache"] = short_conv.empty_cache(1, channels, taps, like.device, like.dtype).expand(batch_size, -1, -1)
        if self.config.success_gate:
            begun = initial_state(1, self.heads, self.value_width, self.success.taps, like.dtype, like.device)
            state |= {name: part.expand(batch_size, -1, -1) for name, part in zip(GATE_STATE, begun, strict=True)}
        return state

    def memory_names(self) -> frozenset[str]:
        return frozenset(self.init_state(1)) - {"cache"}

    def state_ranges(self) -> Mapping[str, StateRange]:
        return memory.state_ranges(self.chunk, self.key_width, decays=self.keep != 1)

    @torch.no_grad()
    def drift(self, state: BlockState) -> Tensor:
        """``[B]`` float64: the share of the prior's variance that is gone, on the mean of heads and directions.

        0 for a new stream; 1 for a memory that has nothing left to learn. With ``decay`` it stays below.
        """
        left = state["covariance"].diagonal(dim1=-2, dim2=-1).double().mean((1, 2))
        return 1 - left

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    # ---- calls

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        layout = self.info.format.chunks(x, self.chunk, None if state is None else state["position"])
        fresh = state is None
        state = self.init_state(x.shape[0], x.device) if state is None else state
        tokens, cache, finite = self._tokens(x, state, context)
        read, after = chunk_ridge(
            tokens, state, self._rule(), layout, self.config.checkpoint_chunks,
            fresh=fresh, want_state=context.want_state,
        )  # fmt: skip
        y, gates = self._output(x, tokens, read, state, context)
        if not context.want_state:
            return y, {}
        return y, {
            **after,
            "cache": cache,
            "skipped": state["skipped"] + context.where_updated(~finite).sum(1),
            **gates,
        }

    @torch.no_grad()
    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        context = context or BlockContext()
        x_tokens = self.info.format.to_tokens(x)
        if x_tokens.shape[1] != 1 or context.reset is not None:
            return super().step(x, state, context)
        self._check_call(x_tokens, state, context)
        mask = context.exec_mask
        with self._without_autocast(x_tokens):
            tokens, cache, finite = self._tokens(x_tokens, state, context)
            run: RidgeStep = self._backend_run("step", x_tokens.device)
            read = run(tokens, state, self._rule(), self.chunk, mask)
            y, gates = self._output(x_tokens, tokens, read, state, context)
        for name, after in {"cache": cache, **gates}.items():
            rows = None if mask is None else mask.view(-1, 1, 1)
            state[name].copy_(after if rows is None else torch.where(rows, after, state[name]))
        left_out = context.where_updated(~finite)[:, 0]
        state["skipped"].add_(left_out if mask is None else torch.where(mask, left_out, 0))
        return self.info.format.from_tokens(y, x)

    def _state_numbers(self) -> int:
        return self.heads * self.key_width * (self.key_width + 2 * self.value_width)

    def _weights(self, context: BlockContext) -> layer.LayerWeights:
        return layer.LayerWeights(
            qk=self.wqk.inputs(context, self.roles.matmul),
            conv_q=self.conv_q,
            conv_k=self.conv_k,
            value=context.cast(self.value_weight, self.roles.matmul),
            write=self.write.tensors(),
            heads=self.heads,
            relu2=self.config.features == "relu2",
        )

    def _tokens(self, x: Tensor, state: BlockState, context: BlockContext) -> tuple[memory.RidgeTokens, Tensor, Tensor]:
        """What enters the memory for ``x [B, T, D]``, the filters' cache after it, and finite tokens ``[B, T]``."""
        source = x
        if self.config.value == "embedding":
            assert context.input_embeddings is not None
            source = context.input_embeddings
        finite = layer.finite_tokens(x) if source is x else layer.finite_tokens(x, source)
        mask = context.updates_mask(x)
        updated = torch.ones_like(finite) if mask is None else mask[:, None]  # [B, T], or [B, 1]
        tokens, cache, finite = layer.inputs(
            x, source, state["cache"], finite, updated, self._weights(context), self.roles
        )
        if self.inner_lr_factor != 1:
            tokens = tokens._replace(strength=self.inner_lr_factor * tokens.strength)
        return tokens, cache, finite

    def _rule(self) -> memory.Rule:
        learned = self.log_regularization.to(self.roles.state)
        least, largest = (math.log(end) for end in REGULARIZATION)
        # Outside the ends the gradient is that at the end, so that a head can return.
        regularization = (learned + (learned.clamp(least, largest) - learned).detach()).exp()
        novelty = None
        if self.config.novelty:
            novelty = (self.novelty_offset.to(self.roles.state), self.novelty_slope.to(self.roles.state))
        return memory.Rule(regularization, self.keep, novelty, variance=self.config.variance_gate)

    def _output(
        self, x: Tensor, tokens: memory.RidgeTokens, read: memory.Read, state: BlockState, context: BlockContext
    ) -> tuple[Tensor, BlockState]:
        """``y [B, T, D]`` and what the success gate keeps, from the state before the call."""
        value = read.value
        kept: BlockState = {}
        gain = torch.full_like(value[..., :1], self.config.readout_scale)  # [B, T, H, 1]
        if self.config.success_gate:
            gate, after = self.success(value, tokens.v, GateState(*(state[name] for name in GATE_STATE)))
            kept, gain = dict(zip(GATE_STATE, after, strict=True)), gain * gate
        if read.variance is not None:
            offset, slope = (part.to(value.dtype) for part in (self.variance_offset, self.variance_slope))
            logit = offset - slope * (read.variance.clamp(min=0) + VARIANCE_EPS).log()
            gain = gain * torch.sigmoid(logit)[..., None]  # [B, T, H] -> [B, T, H, 1]
        output = self.wo.inputs(context, self.roles.matmul)
        # [B, T, H, d] -> [B, T, H d] -> [B, T, D]
        update = output((value * gain).flatten(2), self.roles.matmul).to(self.roles.output)
        return self.at_volume(x, torch.tanh(self.gate.to(self.roles.output)) * update, context), kept

    # ---- figures

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        state = self.init_state(x.shape[0], x.device)
        tokens, _, finite = self._tokens(x, state, context)
        layout = self.info.format.chunks(x, self.chunk)
        read, after = chunk_ridge(tokens, state, self._rule(), layout)
        figures = {
            "key_norm": tokens.k.norm(dim=-1).max(),
            "write_strength": tokens.strength.mean(),
            "memory_used": self.drift(after).mean(),
            "readout": read.value.norm(dim=-1).mean() / tokens.v.norm(dim=-1).mean(),
            "regularization_least": self._rule().regularization.min(),
            "regularization_largest": self._rule().regularization.max(),
            "nonfinite_tokens": (~finite).float().mean(),
            "gate": torch.tanh(self.gate).abs().max(),
        }
        if self.config.success_gate:
            figures["success_gate"] = self.success(read.value, tokens.v)[0].mean()
        return figures

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        flags = []
        if figures.get("nonfinite_tokens", 0) > 0:
            flags.append(
                f"{figures['nonfinite_tokens']:.1%} of the tokens are not finite, or too large, and are not written. "
                "Look at the host's activations and embeddings."
            )
        least, largest = REGULARIZATION
        found = (figures.get("regularization_least", 1.0), figures.get("regularization_largest", 1.0))
        if found[0] < 1.001 * least or found[1] > 0.999 * largest:
            flags.append(
                f"The regularization of the heads is {found[0]:.3g} to {found[1]:.3g}, at an end of [{least:g}, "
                f"{largest:g}]. Start it further inside, or lower the learning rate."
            )
        return flags

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """As the base class says: 1/2 |S^T k - v|^2, a head's target is its value; the initial solution is zero."""
        state = self.init_state(x.shape[0], x.device)
        tokens, _, _ = self._tokens(x, state, context)
        before, after = torch.zeros_like(tokens.v), torch.full_like(tokens.v, torch.nan)
        for first in range(0, x.shape[1], self.chunk):
            part = memory.RidgeTokens(*(each[:, first : first + self.chunk] for each in tokens))
            at = slice(first, first + part.k.shape[1])
            before[:, at] = torch.einsum("bthm,bhmd->bthd", part.k, state["solution"])
            _, state = chunk_ridge(part, state, self._rule(), self.info.format.chunks(part.v.flatten(2), self.chunk))
            if part.k.shape[1] == self.chunk:
                after[:, at] = torch.einsum("bthm,bhmd->bthd", part.k, state["solution"])
        mean = tokens.v.mean(1, keepdim=True)
        read = {"initial": torch.zeros_like(tokens.v), "before": before, "after": after, "baseline": mean}
        # [B, T, H, d] -> [B, H, T]
        return {name: (0.5 * (tokens.v - value).square().sum(-1)).mT for name, value in read.items()}

    @torch.no_grad()
    def recent_losses(self, x: Tensor, state: BlockState, context: BlockContext) -> Tensor:
        tokens, _, _ = self._tokens(x, self.init_state(x.shape[0], x.device), context)
        read = torch.einsum("bthm,bhmd->bthd", tokens.k, state["solution"])
        return (0.5 * (tokens.v - read).square().sum(-1)).mT  # [B, T, H, d] -> [B, H, T]

    def cast_bytes(self) -> int:
        cast = [self.value_weight, *self.wqk.parameters(), *self.wo.parameters()]
        return copy_bytes(cast, self.roles.matmul)

    @property
    def chunk_tokens(self) -> int:
        return self.chunk

    def flops_per_token(self) -> int:
        dim, heads, key, value = self.info.dim, self.heads, self.key_width, self.value_width
        projections = dim * heads * (key + 2 * value + 1) + 2 * heads * key * self.config.conv_kernel
        reads = (2 if self.config.novelty else 1) * key * value + (key * key if self.config.variance_gate else 0)
        writes = 2 * key * value + 2 * key * key
        forgets = key * value + key * key if self.keep != 1 else 0
        return 2 * (projections + heads * (reads + writes + forgets))
