"""A variant as another project would write it: a matrix memory with a short convolution and a forgetting gate.

Per head, with k, v and q of width d from a causal convolution over the last K tokens, as in Titans (Behrouz et al.
2024, arXiv:2501.00663) and gated linear attention (Yang et al. 2023, arXiv:2312.06635):

    S_t = (1 - f_t) S_{t-1} + w_t k_t v_t^T,    y_t = x_t + tanh(gate) * W_o (q_t S_t)

Shape legend: B streams, T tokens, D width, H heads, d = D / H, K taps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.sharding import assign
from moshi_ttt.core.state import BlockState


class ForgettingConfig(BlockConfig):
    variant: Literal["forgetting"] = "forgetting"
    taps: int = Field(default=3, ge=2)
    gate: float = Field(default=0.05, ge=0, le=1)
    forget: float = Field(default=-3.0, ge=-8, le=8)


class ForgettingBlock(SequenceBlock):
    causal = True
    scales_output = True
    scales_inner_lr = True
    config: ForgettingConfig

    def __init__(self, config: ForgettingConfig, info: SiteInfo, roles: DtypeRoles) -> None:
        super().__init__(config, info, roles)
        if info.dim % info.num_heads:
            raise ConfigError(f"{info.site}: width {info.dim} is no multiple of {info.num_heads} heads.")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=info.device, dtype=roles.master))

        dim, heads, width = info.dim, info.num_heads, info.dim // info.num_heads
        self.inputs, self.output = parameter(3 * dim + 2 * heads, dim), parameter(dim, dim)
        self.filter, self.gate = parameter(config.taps, dim), parameter(dim)
        self.start, self.forget_bias = parameter(heads, width, width), parameter(heads)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for drawn in (self.inputs, self.output, self.start):
            assign(drawn, 0.1 * torch.randn(drawn.shape, generator=generator))
        assign(self.filter, F.pad(torch.ones(1, self.info.dim), (0, 0, self.config.taps - 1, 0)))
        assign(self.gate, torch.full(self.gate.shape, self.config.gate))
        assign(self.forget_bias, torch.full(self.forget_bias.shape, self.config.forget))

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        start = self.start.to(device=device, dtype=self.roles.state)
        tail = start.new_zeros(batch_size, self.config.taps - 1, self.info.dim)
        return {"memory": start.expand(batch_size, -1, -1, -1), "tail": tail}

    def memory_names(self) -> frozenset[str]:
        return frozenset({"memory"})

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        state = self.init_state(x.shape[0], x.device) if state is None else state
        heads, dtype = self.info.num_heads, self.roles.state
        seen = torch.cat([state["tail"], x.to(dtype)], dim=1)  # [B, K - 1 + T, D]
        taps = context.cast(self.filter, dtype)
        mixed = sum(tap * seen[:, lag : lag + x.shape[1]] for lag, tap in enumerate(taps))  # [B, T, D]
        dim = self.info.dim
        parts = F.linear(mixed, context.cast(self.inputs, dtype)).split([dim, dim, dim, heads, heads], dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts[:3])  # [B, T, D] -> [B, T, H, d]
        k = F.normalize(k, dim=-1, eps=1e-6)
        write = context.where_updated(self.inner_lr_factor * torch.sigmoid(parts[3]))  # [B, T, H]
        forget = torch.sigmoid(parts[4] + self.forget_bias.to(dtype))
        forget = context.where_updated(self.inner_lr_factor * forget)
        memory, read = state["memory"], []
        for t in range(x.shape[1]):
            written = (write[:, t, :, None] * k[:, t])[..., None] * v[:, t, :, None]  # [B, H, d, d]
            memory = (1 - forget[:, t])[..., None, None] * memory + written
            read.append((q[:, t, :, None] @ memory).flatten(1))  # [B, H, 1, d] -> [B, D]
        added = F.linear(torch.stack(read, dim=1), context.cast(self.output, dtype)).to(self.roles.output)
        y = self.at_volume(x, torch.tanh(self.gate.to(self.roles.output)) * added, context)
        return y, {"memory": memory, "tail": seen[:, x.shape[1] :]}

    def flops_per_token(self) -> int:
        dim, heads = self.info.dim, self.info.num_heads
        return 2 * dim * (4 * dim + 2 * heads + self.config.taps) + 6 * dim * dim // heads
