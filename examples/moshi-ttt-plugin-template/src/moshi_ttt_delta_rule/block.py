"""A memory that learns by the delta rule, per stream and head.

Shape legend: B streams, T tokens, D width, H heads, Dh = D / H.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.casts import copy_bytes
from moshi_ttt.core.sharding import assign
from moshi_ttt_delta_rule.config import DeltaRuleConfig


class DeltaRule(SequenceBlock):
    """``x + tanh(gate) * S q``, with S <- S + lr (v - S k) k^T at each token before its query."""

    config: DeltaRuleConfig
    causal = True
    scales_inner_lr = True
    scales_output = True

    def __init__(self, config, info, roles):
        super().__init__(config, info, roles)

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=info.device, dtype=roles.master))

        head_dim = info.dim // info.num_heads
        self.wq, self.wk, self.wv = (parameter(info.dim, info.dim) for _ in range(3))
        self.memory = parameter(info.num_heads, head_dim, head_dim)  # S before the first token, learned
        self.gate = parameter(info.dim)

    def reset_parameters(self, generator=None):
        for weight in (self.wq, self.wk, self.wv, self.memory):
            assign(weight, 0.02 * torch.randn(weight.shape, generator=generator))
        assign(self.gate, torch.full(self.gate.shape, self.config.gate))

    def init_state(self, batch_size, device=None):
        """``memory [B, H, Dh, Dh]``: everything a stream carries. The first dimension is the stream."""
        start = self.memory.to(device=device, dtype=self.roles.state)
        return {"memory": start.expand(batch_size, -1, -1, -1)}

    def compute(self, x, state, context):
        """``x [B, T, D]`` to ``(y [B, T, D], state)``: a function; it writes into nothing that it was given."""
        memory = (state or self.init_state(x.shape[0], x.device))["memory"]
        q, k, v = (self._heads(x, weight, context) for weight in (self.wq, self.wk, self.wv))
        k = functional.normalize(k, dim=-2)
        recalled = []
        for query, key, value in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):  # each [B, H, Dh, 1]
            update = self.inner_lr_factor * self.config.lr * (value - memory @ key) @ key.mT
            memory = memory + context.where_updated(update)
            recalled.append((memory @ query).flatten(1))
        update = torch.tanh(self.gate.to(self.roles.output)) * torch.stack(recalled, dim=1).to(self.roles.output)
        return self.at_volume(x, update, context), {"memory": memory}

    def _heads(self, x, weight, context):
        """``[B, T, H, Dh, 1]``, multiplied in the dtype for products and kept in the state's."""
        projected = functional.linear(x.to(self.roles.matmul), context.cast(weight, self.roles.matmul))
        return projected.to(self.roles.state).unflatten(-1, (self.info.num_heads, -1))[..., None]

    def cast_bytes(self):
        return copy_bytes([self.wq, self.wk, self.wv], self.roles.matmul)

    def flops_per_token(self):
        head_dim = self.info.dim // self.info.num_heads
        return 6 * self.info.dim**2 + 6 * self.info.dim * head_dim
