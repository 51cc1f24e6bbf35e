"""A faster depformer in training.

With a weight for each step, the depformer hands its linear layers one step of a sequence, a view that is not
contiguous. Where such a layer is frozen, torch then multiplies by a copy of the weight for every row instead of once:
at full width that takes fifty times as long as the rest of a training step.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from moshi_ttt.hosts.moshi.upstream import LMModel, StreamingTransformerLayer


def make_steps_contiguous(model: LMModel) -> None:
    """Have every layer of the depformer that has a weight for each step copy its input first, which is small.

    Numbers stay the same up to the order of additions.
    """
    if model.depformer is None:
        return
    for layer in cast(list[StreamingTransformerLayer], list(model.depformer.layers)):
        for steps in (layer.gating, layer.self_attn.in_projs, layer.self_attn.out_projs):
            if isinstance(steps, nn.ModuleList) and len(steps) > 1:
                for module in steps:
                    module.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(Any, args[0]).contiguous(), *args[1:])
