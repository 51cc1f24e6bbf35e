"""The parameters of a TTT layer: their shapes, their initial values, and the options that they depend on.

Shape legend: D width, H heads, Dh = D / H, C tokens a chunk, K taps.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from math import log

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.plugins.common.finite import check_state_dtype
from moshi_ttt.plugins.common.projection import INIT_STD, Projection
from moshi_ttt.plugins.common.short_conv import one_at_lag
from moshi_ttt.plugins.hybrid.checks import check_rate, checked_head_width
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.fast_network import UpdateRule
from moshi_ttt.plugins.hybrid.layer import HybridLayer


class HybridParameters(SequenceBlock):
    """The parameters of a hybrid layer whose fast network has the layer widths that a subclass gives.

    Warns where heads are narrower than ``checks.NARROWEST_HEAD``, unless the block computes in float64.
    """

    config: HybridConfig
    gate: Tensor
    gate_reversed: Tensor

    def __init__(self, config: HybridConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        check_state_dtype(info, roles)
        head_dim = checked_head_width(config, info, roles)
        widths = self.widths(config, head_dim)
        check_rate(config, head_dim, len(widths) - 1, roles)
        self.needs_input_embeddings = config.value == "embedding"
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
        """Initial values of the parameters that are neither drawn nor zero."""
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
        if type(self).reset_parameters is not HybridParameters.reset_parameters:  # a subclass sets more than this does
            super().reset_unsaved(generator)
            return
        for gate in self.gates():
            if not isinstance(gate, nn.Parameter):
                assign(gate, torch.full(gate.shape, self.config.gate.init, dtype=torch.float64))

    def gates(self) -> list[Tensor]:
        """Alphas ``[D]`` or ``[1]``: of the one pass, or of the forward pass and the reversed one."""
        return [self.gate, self.gate_reversed] if self.config.bidirectional else [self.gate]

    def gate_parameters(self) -> list[nn.Parameter]:
        return [gate for gate in self.gates() if isinstance(gate, nn.Parameter)]

    def token_scale(self) -> Tensor:
        """``[C]``: max(0, 1/(n+1) + learned_n) when causal, 1/C when not."""
        size = self.config.chunk
        if not self.config.causal:
            return torch.full((size,), 1 / size, device=self.gate.device, dtype=self.gate.dtype)
        position = torch.arange(1, size + 1, device=self.gate.device, dtype=self.gate.dtype)
        return (1 / position + self.token_scale_offset).clamp(min=0)

    def update_rule(self) -> UpdateRule:
        """How a finished chunk updates the fast weights, in the state's dtype."""
        config, dtype = self.config, self.roles.state
        momentum = None
        if config.learned_momentum:
            momentum = torch.sigmoid(self.momentum_logit.to(dtype))[:, None, None]  # [H] -> [H, 1, 1]
        elif config.start_momentum > 0:
            momentum = torch.full((1, 1, 1), config.start_momentum, device=self.gate.device, dtype=dtype)
        return UpdateRule(momentum, config.inner_steps)

    def layer(self, gate: Tensor | None = None, context: BlockContext | None = None) -> HybridLayer:
        """The parameters as the functions of ``layer.py`` take them, with ``gate`` or the (first) own."""
        wq, wk, wv, wo = (part.inputs(context, self.roles.matmul) for part in (self.wq, self.wk, self.wv, self.wo))
        return HybridLayer(
            config=self.config,
            roles=self.roles,
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

    def cast_bytes(self) -> int:
        parts = (self.wq, self.wk, self.wv, self.wo)
        return copy_bytes((parameter for part in parts for parameter in part.parameters()), self.roles.matmul)

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
