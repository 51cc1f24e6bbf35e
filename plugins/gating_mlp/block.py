"""In-place TTT: the down projection of the host's gated MLP is the fast weight.

h = act(gate x) * up x as in the host; the output is W_0 h (the host's own product, so that nothing changes at step 0)
plus what the updates of earlier chunks add. The block owns the target generator alone; W_0 is the host's.

Shape legend: B streams, T tokens, N chunks, C tokens a chunk, d width, h hidden width, K taps.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, SequenceBlock, SiteInfo, SiteKind, assign
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.core.state import BlockState
from moshi_ttt.plugins.gating_mlp import ops
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig

INIT_STD = 0.02


class GatingMLP(SequenceBlock):
    """Returns the MLP's output ``[B, T, d]`` without the residual."""

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
        self.needs_input_embeddings = config.target == "input_embed"
        device, dtype, dim = info.device, roles.master, info.dim
        self.conv = nn.Parameter(torch.empty(dim, 1, config.conv_kernel, device=device, dtype=dtype))
        self.projection = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        if config.learned_lr:
            self.lr_weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            self.lr_bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self._warned = False

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
        assign(self.projection, torch.diag(torch.randn(self.info.dim, generator=generator) * INIT_STD))

    def init_state(self, batch_size: int, device: torch.device | None = None) -> BlockState:
        size, dim, hidden = self.config.chunk, self.info.dim, self.hidden_width
        device = device or self.conv.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=self.roles.state, device=device)

        return {
            "position": torch.zeros(batch_size, dtype=torch.int64, device=device),
            "delta": zeros(dim, hidden),
            "key": zeros(size, hidden),
            "target": zeros(size, dim),
            "rate": zeros(size, 1),
        }

    def compute(self, x: Tensor, state: BlockState | None, context: BlockContext) -> tuple[Tensor, BlockState]:
        mlp, size, roles = self.info.mlp, self.config.chunk, self.roles
        assert mlp is not None
        gate, up = mlp.linear_in(x).unflatten(-1, (2, -1)).unbind(-2)
        hidden = mlp.activation(gate) * up
        base = mlp.linear_out(hidden)
        layout = self.info.format.chunks(x, size, None if state is None else state["position"])
        if state is None and not context.want_state and x.shape[1] <= size:
            self._warn_short(x.shape[1])
        source = context.input_embeddings if self.config.target == "input_embed" else x
        assert source is not None
        keys, target, rate = (
            layout.split(part.to(roles.state)) for part in (hidden, source, self._rate(x, context.updates))
        )
        if state is not None:
            earlier = (torch.arange(size, device=x.device) < state["position"][:, None])[..., None]
            keys, target, rate = (
                torch.cat([torch.where(earlier, state[name], part[:, 0])[:, None], part[:, 1:]], dim=1)
                for name, part in (("key", keys), ("target", target), ("rate", rate))
            )
        after = x.shape[1] + (
            torch.zeros(1, dtype=torch.int64, device=x.device) if state is None else state["position"]
        )
        complete = after[:, None] >= size * torch.arange(1, layout.num_chunks + 1, device=x.device)
        left = ops.left_padding(self.config.conv_kernel, self.config.padding)
        values = rate * (ops.filtered(target, self.conv.to(roles.state), left) @ self.projection.to(roles.state))
        scale = ops.clip_scale(keys, values, self.config.clip)
        values = values if scale is None else values * scale[..., None, None]
        start = None if state is None else state["delta"]
        form = ops.gram if ops.prefers_gram(layout.slots, x.shape[-1], keys.shape[-1]) else ops.running_sum
        added = layout.merge(form(keys, values, start, complete, self.config.decay))
        y = (base.to(roles.output) + added.to(roles.output)).to(base.dtype)
        if not context.want_state:
            return y, {}
        return y, self._state_after(keys, values, target, rate, start, complete, after)

    def _rate(self, x: Tensor, updates: bool) -> Tensor:
        """``[B, T, 1]``: the learning rate of each token."""
        if not updates:
            return x.new_zeros(*x.shape[:2], 1)
        if not self.config.learned_lr:
            return x.new_full((*x.shape[:2], 1), self.config.lr, dtype=self.roles.compute)
        wide = x.to(self.roles.compute)
        score = (wide * self.lr_weight.to(wide)).sum(-1, keepdim=True) + self.lr_bias.to(wide)
        return self.config.lr * 2 * torch.sigmoid(score)

    def _state_after(
        self, keys: Tensor, values: Tensor, target: Tensor, rate: Tensor, start: Tensor | None, complete: Tensor,
        after: Tensor,
    ) -> BlockState:  # fmt: skip
        batch, chunks, size, _ = keys.shape
        count, position = complete.sum(1).expand(batch), (after % size).expand(batch)
        seen = (torch.arange(size, device=keys.device) < position[:, None])[..., None]
        which = count.clamp(max=chunks - 1).view(-1, 1, 1, 1)

        def unfinished(part: Tensor) -> Tensor:
            chosen = part.gather(1, which.expand(-1, 1, *part.shape[2:])).squeeze(1)
            return torch.where(seen, chosen, 0)

        return {
            "position": position,
            "delta": ops.final_delta(keys, values, start, complete.expand(batch, -1), self.config.decay),
            "key": unfinished(keys),
            "target": unfinished(target),
            "rate": unfinished(rate),
        }

    def _warn_short(self, length: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"gating_mlp at {self.info.site}: a sequence of {length} tokens is not longer than one chunk of "
                f"{self.config.chunk}, so no update can take effect in it. Lower chunk, or train on longer sequences.",
                stacklevel=2,
            )

    @torch.no_grad()
    def drift(self, state: BlockState) -> Tensor:
        assert self.info.mlp is not None
        square = sum(parameter.double().square().sum() for parameter in self.info.mlp.linear_out.parameters())
        moved = state["delta"].double().square().flatten(1).sum(1)
        return (moved / torch.as_tensor(square)).sqrt().cpu()

    def flops_per_token(self) -> int:
        dim, hidden, kernel = self.info.dim, self.hidden_width, self.config.conv_kernel
        return 2 * (2 * dim * hidden + dim * dim + kernel * dim)


def _out_features(linear: nn.Module) -> int:
    width = getattr(linear, "out_features", None)
    if not isinstance(width, int):
        raise ConfigError(f"{type(linear).__name__} does not say its out_features, so it cannot hold a fast weight.")
    return width
