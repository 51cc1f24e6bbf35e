"""The block that TTT-Linear, TTT-MLP and deeper variants are: the hybrid layer around a fast network of L layers.

A variant says how wide its fast network's layers are; everything else is here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import log

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common import health, inner_curves, inner_loop
from moshi_ttt.plugins.common.block_checks import check_rate, checked_head_width
from moshi_ttt.plugins.common.derivatives import differentiable_again
from moshi_ttt.plugins.common.fast_network import UpdateRule
from moshi_ttt.plugins.common.finite import below, check_state_dtype, largest_factor
from moshi_ttt.plugins.common.hybrid import (
    HybridOptions,
    HybridWeights,
    Linear,
    gated_output,
    inner_inputs,
    objective,
    over_rms,
)
from moshi_ttt.plugins.common.options import HybridConfig
from moshi_ttt.plugins.common.short_conv import Convolutions, empty_cache, one_at_lag

INIT_STD = 0.02
"""Of what is drawn and has no option of its own."""

CACHES = ("query_cache", "key_cache")
"""State of the short convolutions."""


class Projection(nn.Module):
    """Weight ``[out, in]`` and bias ``[out]`` as plain parameters.

    Not an ``nn.Linear``: tools that replace every linear layer (LoRA, quantisation) must leave a block alone.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def tensors(self) -> Linear:
        return Linear(self.weight, self.bias)

    def inputs(self, context: BlockContext | None, dtype: torch.dtype) -> Linear:
        """The parameters for products in ``dtype``: while a host streams, the copies that the stream keeps."""
        if context is None or context.casts is None:
            return self.tensors()
        return Linear(context.cast(self.weight, dtype), context.cast(self.bias, dtype))


class HybridBlock(SequenceBlock):
    """Hybrid layer with a fast network whose layer widths a subclass gives.

    Warns where heads are narrower than ``NARROWEST_HEAD``, unless the block computes in float64.
    """

    config: HybridConfig
    scales_inner_lr = True
    scales_output = True
    skips_nonfinite = True

    gate: Tensor
    gate_reversed: Tensor

    def __init__(self, config: HybridConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        check_state_dtype(info, roles)
        head_dim = checked_head_width(config, info, roles)
        widths = self.widths(config, head_dim)
        check_rate(config, head_dim, len(widths) - 1, roles)
        self.needs_input_embeddings = config.value == "embedding"
        self.options = HybridOptions(
            num_heads=info.num_heads,
            chunk_size=config.chunk,
            base_lr=config.base_lr,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            target_eps=config.target_eps,
            post_norm_eps=config.post_norm_eps,
        )
        device, dtype, heads = info.device, roles.master, info.num_heads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.wq, self.wk, self.wv, self.wo = (Projection((info.dim, info.dim), device, dtype) for _ in range(4))
        self.lr_weight, self.lr_bias = parameter(heads, 1, info.dim), parameter(heads, 1)
        if config.inner_norm:
            self.norm_weight, self.norm_bias = parameter(heads, head_dim), parameter(heads, head_dim)
        if config.conv_kernel is not None:
            self.query_taps, self.key_taps = (parameter(info.dim, config.conv_kernel) for _ in range(2))
        if config.learned_momentum:
            self.momentum_logit = parameter(heads)
        self.post_norm = Projection((info.dim,), device, dtype)
        if config.causal:
            self.token_scale_offset = parameter(config.chunk)
        gates = ["gate", "gate_reversed"] if config.bidirectional else ["gate"]
        for name in gates:
            alpha = parameter(info.dim if config.gate.alpha == "channel" else 1)
            if config.gate.alpha == "fixed":
                self.register_buffer(name, alpha.detach(), persistent=False)
            else:
                self.register_parameter(name, alpha)
        self.fast_weight = nn.ParameterList(parameter(heads, fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.fast_bias = nn.ParameterList(parameter(heads, 1, fan_out) for fan_out in widths[1:])

    @staticmethod
    @abstractmethod
    def widths(config: HybridConfig, head_dim: int) -> tuple[int, ...]:
        """Widths of the fast network, input and output (both ``head_dim``) included: L + 1 numbers."""

    @property
    def causal(self) -> bool:
        return self.config.causal

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        drawn = {self.wq.weight, self.wk.weight, self.wv.weight, self.wo.weight, self.lr_weight}
        fast, given = set(self.fast_weight), self._starting_values()
        for gate in self.gates():
            assign(gate, torch.full(gate.shape, self.config.gate.init, dtype=torch.float64))
        for name, parameter in self.named_parameters():
            if name in ("gate", "gate_reversed"):
                continue
            if parameter in drawn or parameter in fast:
                std = self.config.init_std if parameter in fast else INIT_STD
                value = torch.randn(parameter.shape, generator=generator) * std
            else:
                value = given.get(name, torch.zeros(parameter.shape))
            assign(parameter, value)

    def _starting_values(self) -> dict[str, Tensor]:
        """Of the parameters that are neither drawn nor zero."""
        config, eta = self.config, self.config.start_momentum
        given = {"post_norm.weight": torch.ones(self.post_norm.weight.shape)}
        if config.inner_norm:
            given["norm_weight"] = torch.ones(self.norm_weight.shape)
        if config.conv_kernel is not None:
            given["query_taps"] = one_at_lag(self.info.dim, config.conv_kernel, lag=0)
            given["key_taps"] = one_at_lag(self.info.dim, config.conv_kernel, lag=1)
        if config.learned_momentum:
            given["momentum_logit"] = torch.full(self.momentum_logit.shape, log(eta / (1 - eta)))
        return given

    def reset_unsaved(self, generator: torch.Generator | None = None) -> None:
        if type(self).reset_parameters is not HybridBlock.reset_parameters:  # a subclass sets more than is set here
            super().reset_unsaved(generator)
            return
        for gate in self.gates():
            if not isinstance(gate, nn.Parameter):
                assign(gate, torch.full(gate.shape, self.config.gate.init, dtype=torch.float64))

    def gates(self) -> list[Tensor]:
        """Alphas ``[D]`` or ``[1]``: of the one pass, or of the forward pass and the reversed one."""
        return [self.gate, self.gate_reversed] if self.config.bidirectional else [self.gate]

    def token_scale(self) -> Tensor:
        """``[C]``: max(0, 1/(n+1) + learned_n) when causal, 1/C when not."""
        size = self.config.chunk
        if not self.config.causal:
            return torch.full((size,), 1 / size, device=self.gate.device, dtype=self.gate.dtype)
        position = torch.arange(1, size + 1, device=self.gate.device, dtype=self.gate.dtype)
        return (1 / position + self.token_scale_offset).clamp(min=0)

    def gate_parameters(self) -> list[nn.Parameter]:
        return [gate for gate in self.gates() if isinstance(gate, nn.Parameter)]

    def weights(self, gate: Tensor | None = None, context: BlockContext | None = None) -> HybridWeights:
        """The parameters as the pure functions of ``hybrid`` take them, with the given gate or the (first) own."""
        wq, wk, wv, wo = (part.inputs(context, self.roles.matmul) for part in (self.wq, self.wk, self.wv, self.wo))
        return HybridWeights(
            wq=wq,
            wk=wk,
            wv=wv,
            wo=wo,
            lr_weight=self.lr_weight,
            lr_bias=self.lr_bias,
            norm_weight=self.norm_weight if self.config.inner_norm else None,
            norm_bias=self.norm_bias if self.config.inner_norm else None,
            post_norm=self.post_norm.tensors(),
            token_scale=self.token_scale(),
            gate=self.gate if gate is None else gate,
        )

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        def parts(parameters: nn.ParameterList) -> tuple[Tensor, ...]:
            return tuple(p.to(device=device, dtype=self.roles.state) for p in parameters)

        config, (weights, biases) = self.config, (parts(self.fast_weight), parts(self.fast_bias))
        momentum = config.start_momentum > 0
        state = inner_loop.initial_state(
            weights, biases, config.chunk, batch_size, momentum=momentum, steps=config.inner_steps
        )
        if config.conv_kernel is not None:
            like = weights[0]
            cache = empty_cache(batch_size, self.info.dim, config.conv_kernel, like.device, like.dtype)
            state |= {name: cache.clone() for name in CACHES}
        return state

    def memory_names(self) -> frozenset[str]:
        return super().memory_names() - set(CACHES)

    def update_rule(self) -> UpdateRule:
        """What a finished chunk does with its gradients, in the state's dtype."""
        config, dtype = self.config, self.roles.state
        momentum = None
        if config.learned_momentum:
            momentum = torch.sigmoid(self.momentum_logit.to(dtype))[:, None, None]
        elif config.start_momentum > 0:
            momentum = torch.full((1, 1, 1), config.start_momentum, device=self.gate.device, dtype=dtype)
        return UpdateRule(momentum, config.inner_steps)

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        y, after = self._directions(x, state, context)
        if not y.requires_grad or torch.compiler.is_compiling():  # what is compiled, torch differentiates only once
            return y, after
        source = context.input_embeddings if self.needs_input_embeddings else None
        inputs = (x, *(() if source is None else (source,)), *self.parameters(), *(state or {}).values())
        again = partial(self._again, None if state is None else tuple(state), replace(context, input_embeddings=None))
        (y,) = differentiable_again((y,), inputs, lambda *given: (again(*given)[0],))
        if learned := [name for name, tensor in after.items() if context.want_state and tensor.requires_grad]:
            tensors = differentiable_again(
                [after[name] for name in learned], inputs, lambda *given: [again(*given)[1][name] for name in learned]
            )
            after = {**after, **dict(zip(learned, tensors, strict=True))}
        return y, after

    def _again(
        self, state: tuple[str, ...] | None, context: BlockContext, x: Tensor, *given: Tensor
    ) -> tuple[Tensor, BlockState]:
        """What ``compute`` computes, exactly differentiable, of the tensors that it depends on.

        ``given``: the input embeddings where they are needed, the parameters' values, then the state's by name.
        """
        if self.needs_input_embeddings:
            context, given = replace(context, input_embeddings=given[0]), given[1:]
        names = [f"block.{name}" for name, _ in self.named_parameters()]
        parameters = dict(zip(names, given[: len(names)], strict=True))
        start = None if state is None else dict(zip(state, given[len(names) :], strict=True))
        with self._without_autocast(x):
            return torch.func.functional_call(_Exact(self), parameters, (x, start, context))  # type: ignore[no-any-return]

    def _directions(
        self, x: Tensor, state: BlockState | None, context: BlockContext, exact: bool = False
    ) -> tuple[Tensor, BlockState]:
        """The layer in its one direction or in both; ``exact``: by operations with right second derivatives."""
        y, after = self._pass(x, state, context, self.gate, exact)
        if self.config.bidirectional:
            # Tokens change places and RoPE does not: a token is turned by the place it is moved to.
            if self.needs_input_embeddings and context.input_embeddings is not None:
                embeddings = _reversed(context.input_embeddings, context.prefix)
                context = replace(context, input_embeddings=embeddings)
            y = self._pass(_reversed(y, context.prefix), None, context, self.gate_reversed, exact)[0]
            y = _reversed(y, context.prefix)
        return y, after

    def _pass(
        self, x: Tensor, state: BlockState | None, context: BlockContext, gate: Tensor, exact: bool
    ) -> tuple[Tensor, BlockState]:
        """The layer over the tokens in the order they are in, ``x [B, T, D]``, with its gate and residual."""
        batch, length, _ = x.shape
        offset = None if state is None else state["position"]
        state = self.init_state(batch, x.device) if state is None else state
        layout = self.info.format.chunks(x, self.config.chunk, offset)
        weights = self.weights(gate, context)
        if context.coordinates is None:
            start = torch.zeros(1, dtype=torch.int64, device=x.device) if offset is None else offset
            position = (start[:, None] + torch.arange(length, device=x.device)) % self.config.chunk
        else:
            position = context.coordinates[None]
        caches = [state[name] for name in CACHES if name in state]
        y, after = inner_loop.run(
            self._tokens(x, position, weights, context, exact, caches),
            state,
            objective(weights, self.options, self.roles, exact),
            weights.token_scale.to(self.roles.state),
            layout=layout,
            causal=self.config.causal,
            checkpoint_chunks=self.config.checkpoint_chunks,
            rule=self.update_rule(),
        )
        if caches:
            after |= dict(zip(CACHES, caches, strict=True))
        return gated_output(x, y, weights, self.options, self.roles, self.volume_in(context)), after

    @torch.no_grad()
    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)
        if tokens.shape[1] != 1 or context.reset is not None or not self.config.causal:
            return super().step(x, state, context)
        self._check_call(tokens, state, context)
        with self._without_autocast(tokens):
            weights = self.weights(context=context)
            caches = [state[name] for name in CACHES if name in state]
            y = inner_loop.step(
                self._tokens(tokens, state["position"][:, None], weights, context, caches=caches, in_place=True),
                state,
                objective(weights, self.options, self.roles),
                weights.token_scale.to(self.roles.state),
                context.exec_mask,
                self.update_rule(),
            )
            y = gated_output(tokens, y, weights, self.options, self.roles, self.volume_in(context))
        return self.info.format.from_tokens(y, x)

    def _tokens(
        self,
        x: Tensor,
        position: Tensor,
        weights: HybridWeights,
        context: BlockContext,
        exact: bool = False,
        caches: list[Tensor] | None = None,
        in_place: bool = False,
    ) -> inner_loop.Tokens:
        """What enters the inner loop. ``caches`` of the convolutions, of queries and keys (None: a stream's start), are
        replaced in the list by those after the call, or, ``in_place``, written to where ``context`` says so.
        """
        source = x
        if self.needs_input_embeddings:
            assert context.input_embeddings is not None
            source = context.input_embeddings
        with torch.no_grad():
            finite = self._finite(x) if source is x else self._finite(x) & self._finite(source)
            kept = finite[..., None]  # [B, T, 1]
        if torch.is_grad_enabled():
            # A token that is not finite keeps its nan in the residual, and enters no product with a parameter: its
            # gradient, however it is masked, would be zero times nan.
            same = source is x
            x = torch.where(kept, x, 0)
            source = x if same else torch.where(kept, source, 0)
        mix = None
        if self.config.conv_kernel is not None:
            caches = [self._empty_cache(x) for _ in CACHES] if caches is None else caches
            taps = [self.query_taps, self.key_taps]
            mix = Convolutions(taps, caches, finite, in_place=in_place, exec_mask=context.exec_mask)
        value = self._value_source(source, exact)
        tokens = inner_inputs(x, position, weights, self.options, self.roles, exact, source=value, mix=mix)
        # A rate of nan tells the inner loop to leave the token out.
        lr = tokens.lr if self.inner_lr_factor == 1 else self.inner_lr_factor * tokens.lr
        return tokens._replace(lr=torch.where(kept, context.where_updated(lr), torch.nan))

    @staticmethod
    def _finite(x: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens of ``x [B, T, D]`` that may enter the layer."""
        return below(x, largest_factor(torch.promote_types(x.dtype, torch.float32)))

    def _value_source(self, source: Tensor, exact: bool = False) -> Tensor:
        """What values are projected from, ``[B, T, D]``, of the hidden state or of the input embeddings."""
        return over_rms(source.to(self.roles.compute), exact) if self.needs_input_embeddings else source

    def _empty_cache(self, x: Tensor) -> Tensor:
        assert self.config.conv_kernel is not None
        return empty_cache(x.shape[0], x.shape[2], self.config.conv_kernel, x.device, self.roles.state)

    def _from_start(self, x: Tensor, context: BlockContext) -> tuple[HybridWeights, inner_loop.Tokens]:
        """What enters the inner loop when ``x [B, T, D]`` starts a sequence."""
        weights = self.weights()
        position = torch.arange(x.shape[1], device=x.device) % self.config.chunk
        if context.coordinates is not None:
            position = context.coordinates
        return weights, self._tokens(x, position[None], weights, context)

    def statistics(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        heads = self.info.num_heads
        weights, tokens = self._from_start(x, context)
        tokens, finite = inner_loop.only_finite(tokens)
        source = context.input_embeddings if self.needs_input_embeddings else x
        assert source is not None
        value = weights.wv(self._value_source(source), self.roles.matmul).unflatten(-1, (heads, -1)).to(tokens.k)
        norm = objective(weights, self.options, self.roles)
        scale = weights.token_scale.to(self.roles.state)
        state = self.init_state(x.shape[0], x.device)
        return {
            **health.target_figures(tokens, finite, value, norm),
            **health.inner_losses(tokens, finite, state, norm, scale, self.update_rule()),
            "token_scale_last": scale[-1],
            "nonfinite_tokens": (~finite).float().mean(),
            "gate": torch.tanh(torch.stack(self.gates())).abs().max(),
        }

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """As the base class says; of a bidirectional block, in the forward direction."""
        with self._without_autocast(x):
            weights, tokens = self._from_start(x, context)
            norm = objective(weights, self.options, self.roles)
            scale = weights.token_scale.to(self.roles.state)
            state = self.init_state(x.shape[0], x.device)
            return inner_curves.hybrid(tokens, state, norm, scale, self.update_rule())

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        return health.red_flags(figures)

    def cast_bytes(self) -> int:
        parts = (self.wq, self.wk, self.wv, self.wo)
        return copy_bytes((parameter for part in parts for parameter in part.parameters()), self.roles.matmul)

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    @property
    def chunk_tokens(self) -> int:
        return self.config.chunk

    def flops_per_token(self) -> int:
        dim, heads, size = self.info.dim, self.info.num_heads, self.config.chunk
        total = 2 * (4 * dim * dim + heads * dim + 2 * (self.config.conv_kernel or 0) * dim)
        for i, weight in enumerate(self.fast_weight):
            _, fan_in, fan_out = weight.shape
            # key and query forward; from the second layer on the gradient's way back; the chunk's update, which a step
            # runs whether or not the chunk is complete
            products = (2 + (i > 0) + size) * fan_in * fan_out + size * (fan_in + fan_out)
            # each further step on the chunk: all of its keys forward and back, and an update
            products += (self.config.inner_steps - 1) * size * (2 + (i > 0)) * fan_in * fan_out
            if self.config.start_momentum > 0:
                products += (1 + self.config.inner_steps) * fan_in * fan_out
            total += 2 * heads * products
        return total * (2 if self.config.bidirectional else 1)


def _reversed(x: Tensor, prefix: int) -> Tensor:
    """``x [B, T, D]`` with the tokens after the first ``prefix`` in reverse; its own inverse."""
    return torch.cat([x[:, :prefix], x[:, prefix:].flip(1)], dim=1) if prefix else x.flip(1)


class _Exact(nn.Module):
    """A block's computation by operations that can be differentiated any number of times."""

    def __init__(self, block: HybridBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        return self.block._directions(x, state, context, exact=True)
