"""Checks of ``gating_mlp`` when it is built."""

from __future__ import annotations

import torch

from moshi_ttt.core.block import SiteInfo
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.gated_mlp import GatedMLP, input_projections, output_projection
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.plugins.common.finite import check_state_dtype
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig


def check_mlp(mlp: GatedMLP, info: SiteInfo) -> None:
    """Raise ConfigError where a projection of the host's MLP is quantized."""
    for part in (*input_projections(mlp), output_projection(mlp)):
        if not all(parameter.is_floating_point() for parameter in part.parameters()):
            raise ConfigError(
                f"{info.site}: its {type(part).__name__} is quantised, and nothing can be learned on top of that. "
                "Load the model unquantised."
            )


def check_options(config: GatingMLPConfig, info: SiteInfo, roles: DtypeRoles, chunk: int) -> None:
    """Raise ConfigError for options that do not fit the policy's dtypes or the host's rate; ``chunk`` is in tokens."""
    check_state_dtype(info, roles)
    if config.update == "ridge" and roles.state not in (torch.float32, torch.float64):
        raise ConfigError(
            f"{info.site}: update: ridge solves a system in the state's dtype, which policy {roles.policy!r} makes "
            f"{roles.state}. Use a policy whose state is float32 (fp32_state), or another update."
        )
    if config.start == "next_frame" and chunk < 2:
        raise ConfigError(
            f"{info.site}: start: next_frame, and a chunk of {config.chunk} is one token: the filter does not see "
            "the next. Take a longer chunk, or start: published."
        )
