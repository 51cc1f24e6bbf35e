"""The block that TTT-Linear, TTT-MLP and deeper variants are: the hybrid layer around a fast network of L layers.

A variant says how wide its fast network's layers are; everything else is here, once.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.config import BlockConfig, FrozenConfig
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.common import health, inner_curves, inner_loop
from moshi_ttt.plugins.common.derivatives import differentiable_again
from moshi_ttt.plugins.common.finite import below, check_state_dtype, largest_factor
from moshi_ttt.plugins.common.hybrid import (
    HybridOptions,
    HybridWeights,
    Linear,
    gated_output,
    inner_inputs,
    inner_norm,
)
from moshi_ttt.plugins.common.rope import widths as axis_widths

INIT_STD = 0.02


class GateConfig(FrozenConfig):
    """``tanh(alpha)`` times what the layer adds.

    Attributes:
        init: alpha at the start; 0 makes the block an identity.
        alpha: one learned for each ``channel``, one learned for the whole ``layer``, or ``fixed`` at ``init``.
    """

    init: float = Field(default=0.05, ge=0.0, le=1.0)
    alpha: Literal["channel", "layer", "fixed"] = "channel"


class HybridConfig(BlockConfig):
    """Options of every hybrid block.

    Attributes:
        chunk: tokens per inner-loop step (mini-batch).
        base_lr: inner learning rate before the learned per-token factor, divided by the head width.
        causal: False lets a token see its whole chunk; a causal host refuses that.
        bidirectional: run over the sequence and then over the reversed result, by the same weights and a gate each; not
            causal (and ``causal`` is then False when it is left out). As published (arXiv:2504.05298) tokens are
            reversed and rotary positions are not, and a prefix that the host's format declares, a text before a
            video, stays in front.
        gate: the gate, or gates.
        rope_theta: base of the rotary frequencies.
        checkpoint_chunks: chunks of the inner loop that a backward pass computes again together: it then needs only the
            tokens and the fast weights between such groups; None keeps everything. No result depends on it.
        norm_eps, target_eps, post_norm_eps: of the inner LayerNorm, the target's standard deviation, the post norm.
    """

    chunk: int = Field(default=32, ge=1)
    base_lr: float = Field(gt=0.0)
    causal: bool = True
    bidirectional: bool = False
    gate: GateConfig = GateConfig()
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    norm_eps: float = Field(default=1e-6, gt=0.0)
    target_eps: float = Field(default=1e-8, gt=0.0)
    post_norm_eps: float = Field(default=1e-6, gt=0.0)
    checkpoint_chunks: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _both_directions_are_not_causal(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("bidirectional") is True:
            return {"causal": False, **values}
        return values

    @model_validator(mode="after")
    def _not_causal_and_bidirectional(self) -> HybridConfig:
        if self.bidirectional and self.causal:
            raise ValueError("a bidirectional block sees the future: it cannot be causal; leave causal out")
        return self


class Projection(nn.Module):
    """Weight ``[out, in]`` and bias ``[out]`` as plain parameters.

    Not an ``nn.Linear``: tools that replace every linear layer (LoRA, quantisation) must leave a block alone.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))

    def tensors(self) -> Linear:
        return Linear(self.weight, self.bias)

    def inputs(self, context: BlockContext | None, dtype: torch.dtype) -> Linear:
        """The parameters for products in ``dtype``: while a host streams, the copies that the stream keeps."""
        if context is None or context.casts is None:
            return self.tensors()
        return Linear(context.cast(self.weight, dtype), context.cast(self.bias, dtype))


NARROWEST_HEAD = 8
"""The head width from which streaming gives what training saw within 1e-5 in float32. A target is divided by a standard
deviation over the head's channels; over fewer than these it may come as close to zero as rounding."""


class HybridBlock(SequenceBlock):
    """Hybrid layer with a fast network whose layer widths a subclass gives.

    Warns where heads are narrower than ``NARROWEST_HEAD``, unless the block computes in float64.
    """

    config: HybridConfig
    scales_inner_lr = True
    skips_nonfinite = True

    gate: Tensor
    gate_reversed: Tensor

    def __init__(self, config: HybridConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        check_state_dtype(info, roles)
        head_dim, remainder = divmod(info.dim, info.num_heads)
        if remainder or head_dim % 2:
            raise ConfigError(
                f"Width {info.dim} over {info.num_heads} heads: RoPE needs an even whole head width, got "
                f"{info.dim / info.num_heads:g}. Use a host whose head width is even."
            )
        if head_dim < NARROWEST_HEAD and torch.finfo(roles.compute).eps > torch.finfo(torch.float64).eps:
            # Without the site, so that Python shows it once however many blocks a model has.
            warnings.warn(
                f"Heads of width {head_dim}: from width {NARROWEST_HEAD} on a streamed token and the same token in one "
                "call agree within 1e-5 in float32; over narrower heads rounding grows, and they part ways in long "
                "sequences. Use a host with wider heads, or load it in float64.",
                stacklevel=2,
            )
        if info.format.axes > 1:
            if config.causal:
                raise ConfigError(
                    f"{info.site}: a grid is heard as a whole. Set causal: false, or bidirectional: true."
                )
            try:
                axis_widths(head_dim, info.format.axes)
            except ValueError as error:
                raise ConfigError(f"{info.site}: {error} Use a host whose head width is a multiple of 16.") from None
        widths = self.widths(config, head_dim)
        # The update of a layer grows with the rate, and what the network gives with the product of its layers.
        largest = largest_factor(roles.state) ** (1 / (len(widths) - 1))
        if config.base_lr / head_dim > largest:
            raise ConfigError(
                f"base_lr {config.base_lr:g} gives a token the rate {config.base_lr / head_dim:g}, and "
                f"updates of {len(widths) - 1} layers in {roles.state} stay finite up to {largest:.3g}. Lower base_lr."
            )
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
        self.norm_weight, self.norm_bias = parameter(heads, head_dim), parameter(heads, head_dim)
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
        drawn = {self.wq.weight, self.wk.weight, self.wv.weight, self.wo.weight, self.lr_weight, *self.fast_weight}
        ones = {self.norm_weight, self.post_norm.weight}
        for gate in self.gates():
            assign(gate, torch.full(gate.shape, self.config.gate.init, dtype=torch.float64))
        for name, parameter in self.named_parameters():
            if name in ("gate", "gate_reversed"):
                continue
            if parameter in drawn:
                value = torch.randn(parameter.shape, generator=generator) * INIT_STD
            else:
                value = torch.ones(parameter.shape) if parameter in ones else torch.zeros(parameter.shape)
            assign(parameter, value)

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
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            post_norm=self.post_norm.tensors(),
            token_scale=self.token_scale(),
            gate=self.gate if gate is None else gate,
        )

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        def parts(parameters: nn.ParameterList) -> tuple[Tensor, ...]:
            return tuple(p.to(device=device, dtype=self.roles.state) for p in parameters)

        weights, biases = parts(self.fast_weight), parts(self.fast_bias)
        return inner_loop.initial_state(weights, biases, self.config.chunk, batch_size)

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        y, after = self._directions(x, state, context)
        if not y.requires_grad or torch.compiler.is_compiling():  # what is compiled, torch differentiates only once
            return y, after
        inputs = (x, *self.parameters(), *(state or {}).values())
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
        """What ``compute`` computes, exactly differentiable, of its parameters' values and then its state's by name."""
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
        y, after = inner_loop.run(
            self._tokens(x, position, weights, context, exact),
            state,
            replace(inner_norm(weights, self.options, self.roles), exact=exact),
            weights.token_scale.to(self.roles.state),
            layout=layout,
            causal=self.config.causal,
            checkpoint_chunks=self.config.checkpoint_chunks,
        )
        return gated_output(x, y, weights, self.options, self.roles), after

    @torch.no_grad()
    def step(self, x: Tensor, state: BlockState, context: BlockContext | None = None) -> Tensor:
        context = context or BlockContext()
        tokens = self.info.format.to_tokens(x)
        if tokens.shape[1] != 1 or context.reset is not None or not self.config.causal:
            return super().step(x, state, context)
        self._check_call(tokens, state, context)
        with self._without_autocast(tokens):
            weights = self.weights(context=context)
            y = inner_loop.step(
                self._tokens(tokens, state["position"][:, None], weights, context),
                state,
                inner_norm(weights, self.options, self.roles),
                weights.token_scale.to(self.roles.state),
                context.exec_mask,
            )
            y = gated_output(tokens, y, weights, self.options, self.roles)
        return self.info.format.from_tokens(y, x)

    def _tokens(
        self, x: Tensor, position: Tensor, weights: HybridWeights, context: BlockContext, exact: bool = False
    ) -> inner_loop.Tokens:
        with torch.no_grad():
            finite = below(x, largest_factor(torch.promote_types(x.dtype, torch.float32)))[..., None]  # [B, T, 1]
        if torch.is_grad_enabled():
            # A token that is not finite keeps its nan in the residual, and enters no product with a parameter: its
            # gradient, however it is masked, would be zero times nan.
            x = torch.where(finite, x, 0)
        tokens = inner_inputs(x, position, weights, self.options, self.roles, exact)
        # A rate of nan tells the inner loop to leave the token out.
        lr = tokens.lr if self.inner_lr_factor == 1 else self.inner_lr_factor * tokens.lr
        return tokens._replace(lr=torch.where(finite, context.where_updated(lr), torch.nan))

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
        value = weights.wv(x, self.roles.matmul).unflatten(-1, (heads, -1)).to(tokens.k)
        norm = inner_norm(weights, self.options, self.roles)
        scale = weights.token_scale.to(self.roles.state)
        state = self.init_state(x.shape[0], x.device)
        return {
            **health.target_figures(tokens, finite, value, norm.weight, norm.bias),
            **health.inner_losses(tokens, finite, state, norm, scale, self.config.chunk),
            "token_scale_last": scale[-1],
            "nonfinite_tokens": (~finite).float().mean(),
            "gate": torch.tanh(torch.stack(self.gates())).abs().max(),
        }

    @torch.no_grad()
    def inner_losses(self, x: Tensor, context: BlockContext) -> dict[str, Tensor]:
        """As the base class says; of a bidirectional block, in the forward direction."""
        with self._without_autocast(x):
            weights, tokens = self._from_start(x, context)
            norm = inner_norm(weights, self.options, self.roles)
            scale = weights.token_scale.to(self.roles.state)
            return inner_curves.hybrid(tokens, self.init_state(x.shape[0], x.device), norm, scale)

    def red_flags(self, figures: Mapping[str, float]) -> list[str]:
        return health.red_flags(figures)

    def cast_bytes(self) -> int:
        parts = (self.wq, self.wk, self.wv, self.wo)
        return copy_bytes((parameter for part in parts for parameter in part.parameters()), self.roles.matmul)

    def skipped_updates(self, state: BlockState) -> Tensor:
        return state["skipped"]

    def flops_per_token(self) -> int:
        dim, heads, size = self.info.dim, self.info.num_heads, self.config.chunk
        total = 2 * (4 * dim * dim + heads * dim)
        for i, weight in enumerate(self.fast_weight):
            _, fan_in, fan_out = weight.shape
            # key and query forward; from the second layer on the gradient's way back; the chunk's update, which a step
            # runs whether or not the chunk is complete
            products = (2 + (i > 0) + size) * fan_in * fan_out + size * (fan_in + fan_out)
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
