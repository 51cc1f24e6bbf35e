"""Checks of a TTT layer when it is built: errors and warnings."""

from __future__ import annotations

import warnings

import torch

from moshi_ttt.core.block import SiteInfo
from moshi_ttt.core.errors import ConfigError
from moshi_ttt.core.precision import DtypeRoles
from moshi_ttt.plugins.common.finite import largest_factor
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.rope import widths as axis_widths

NARROWEST_HEAD = 8
"""The smallest head width at which streaming equals training within 1e-5 in float32. A target is divided by a standard
deviation over the head's channels; over fewer channels that may be as small as rounding."""


def checked_head_width(config: HybridConfig, info: SiteInfo, roles: DtypeRoles) -> int:
    """The width of a head. Raises ConfigError where RoPE cannot use it, or the block does not fit the host's format."""
    head_dim, remainder = divmod(info.dim, info.num_heads)
    if remainder or head_dim % 2:
        raise ConfigError(
            f"Width {info.dim} over {info.num_heads} heads: RoPE needs an even whole head width, got "
            f"{info.dim / info.num_heads:g}. Use a host whose head width is even."
        )
    if head_dim < NARROWEST_HEAD and torch.finfo(roles.compute).eps > torch.finfo(torch.float64).eps:
        # Without the site, so that Python shows it once however many blocks a model has.
        warnings.warn(
            f"Heads of width {head_dim}: from width {NARROWEST_HEAD} on, streaming and one call agree within 1e-5 in "
            "float32. Over narrower heads the difference grows with the length of the sequence. Use a host with wider "
            "heads, or load it in float64.",
            stacklevel=3,
        )
    if info.format.axes > 1:
        if config.causal:
            raise ConfigError(
                f"{info.site}: tokens of a grid have no causal order. Set causal: false, or bidirectional: true."
            )
        if config.conv_kernel is not None:
            raise ConfigError(
                f"{info.site}: conv_kernel: {config.conv_kernel} mixes each token with those before it in time, and "
                "tokens of a grid do not follow each other. Leave it out."
            )
        try:
            axis_widths(head_dim, info.format.axes)
        except ValueError as error:
            raise ConfigError(f"{info.site}: {error} Use a host whose head width is a multiple of 16.") from None
    return head_dim


def check_rate(config: HybridConfig, head_dim: int, layers: int, roles: DtypeRoles) -> None:
    """Raise ConfigError for a base_lr with which the fast weights of ``layers`` layers would not stay finite.

    And for initial ones so large that no update would ever be applied.
    """
    # The update of a layer grows with the rate, and what the network gives with the product of its layers.
    largest = largest_factor(roles.state) ** (1 / layers)
    if config.base_lr / head_dim > largest:
        raise ConfigError(
            f"base_lr {config.base_lr:g} gives a token the rate {config.base_lr / head_dim:g}, and "
            f"updates of {layers} layers in {roles.state} stay finite up to {largest:.3g}. Lower base_lr."
        )
    if not config.inner_norm and config.base_lr > head_dim:
        raise ConfigError(
            f"base_lr {config.base_lr:g} with inner_norm: false: above the head width, {head_dim}, a step may "
            "end farther from a chunk's minimum than it began, and the fast weights grow without end. Lower base_lr to "
            f"{head_dim} or less, or set inner_norm: true."
        )
    if not config.inner_norm and 6 * config.init_std >= largest:
        raise ConfigError(
            f"init_std {config.init_std:g} with inner_norm: false: {layers} layers in {roles.state} are "
            f"updated while their weights are below {largest:.3g}; some would start above. Lower it to less than "
            f"{largest / 6:.3g}, or set inner_norm: true."
        )
