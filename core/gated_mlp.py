"""The gated MLP of a host, as feed-forward blocks see it: ``down(activation(gate x) * up x)`` in one of two layouts.

Shape legend: B streams, T tokens, D width of the host's activations, h hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from moshi_ttt.core.errors import ConfigError


class FusedMLP(Protocol):
    """One product makes gate and up, in this order: ``linear_in [2 h, D]``, then ``linear_out [D, h]`` (Moshi)."""

    @property
    def linear_in(self) -> nn.Module: ...

    @property
    def linear_out(self) -> nn.Module: ...

    @property
    def activation(self) -> Callable[[Tensor], Tensor]: ...


class SplitMLP(Protocol):
    """Two products: ``gate_proj`` and ``up_proj [h, D]``, then ``down_proj [D, h]`` (Llama, Qwen, Mistral)."""

    @property
    def gate_proj(self) -> nn.Module: ...

    @property
    def up_proj(self) -> nn.Module: ...

    @property
    def down_proj(self) -> nn.Module: ...

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]: ...


GatedMLP = FusedMLP | SplitMLP
"""What a host gives as ``SiteInfo.mlp``. The modules stay the host's own: the functions below look them up at each
call, because a host's tools may replace them (LoRA)."""

FUSED = ("linear_in", "linear_out", "activation")
SPLIT = ("gate_proj", "up_proj", "down_proj", "act_fn")


def is_fused(mlp: object) -> TypeGuard[FusedMLP]:
    """Whether ``mlp`` has all that a ``FusedMLP`` has."""
    return all(hasattr(mlp, name) for name in FUSED)


def _is_split(mlp: object) -> TypeGuard[SplitMLP]:
    return all(hasattr(mlp, name) for name in SPLIT)


def require_gated_mlp(mlp: Any, where: object) -> GatedMLP:
    """``mlp`` itself, or ConfigError where it is neither a ``FusedMLP`` nor a ``SplitMLP``; ``where`` is its site."""
    if is_fused(mlp) or _is_split(mlp):
        return mlp
    had = [name for name in (*FUSED, *SPLIT) if hasattr(mlp, name)]
    given = "None" if mlp is None else f"a {type(mlp).__name__} with {', '.join(had) or 'none of these'}"
    raise ConfigError(
        f"{where}: the block needs the host's GatedMLP, and the host gives {given}. A GatedMLP has "
        f"{', '.join(FUSED)} (fused), or {', '.join(SPLIT)} (split). Choose layers whose feed-forward is gated, or "
        "have the host give SiteInfo(mlp=...)."
    )


def hidden(mlp: GatedMLP, x: Tensor) -> Tensor:
    """``[B, T, h]``: ``activation(gate x) * up x`` of ``x [B, T, D]``."""
    found: Tensor
    if is_fused(mlp):
        gate, up = mlp.linear_in(x).unflatten(-1, (2, -1)).unbind(-2)  # [B, T, 2 h] -> [B, T, 2, h] -> twice [B, T, h]
        found = mlp.activation(gate) * up
    else:
        assert _is_split(mlp)
        found = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return found


def activation(mlp: GatedMLP) -> Callable[[Tensor], Tensor]:
    """What is applied to the gate."""
    if is_fused(mlp):
        return mlp.activation
    assert _is_split(mlp)
    return mlp.act_fn


def input_projections(mlp: GatedMLP) -> tuple[nn.Module, ...]:
    """The modules that make gate and up: one, or two."""
    if is_fused(mlp):
        return (mlp.linear_in,)
    assert _is_split(mlp)
    return (mlp.gate_proj, mlp.up_proj)


def output_projection(mlp: GatedMLP) -> nn.Module:
    """The module from hidden width to the host's width."""
    if is_fused(mlp):
        return mlp.linear_out
    assert _is_split(mlp)
    return mlp.down_proj


def output(mlp: GatedMLP, x: Tensor) -> Tensor:
    """``[B, T, D]``: the whole MLP on ``x [B, T, D]``."""
    found: Tensor = output_projection(mlp)(hidden(mlp, x))
    return found


def hidden_width(mlp: GatedMLP) -> int:
    """h. Raises ConfigError where the input projection has no ``out_features``."""
    first = input_projections(mlp)[0]
    width = getattr(first, "out_features", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"The input projection of this GatedMLP, a {type(first).__name__}, has no out_features, so its "
            "hidden width is unknown. Give it that attribute."
        )
    return width // 2 if is_fused(mlp) else width
