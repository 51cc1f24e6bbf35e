"""The names that two published implementations give the weights of a TTT layer.

``ttt-video-dit`` (arXiv:2504.05298): the same layer as ours when not causal. Its gate is a module of its own beside the
layer; pass its ``gating_alpha`` with the layer's tensors (and that of the reversed pass as ``backward_gating_alpha``).
It has separate gates for the tokens of a text before the video; ours gates them as the video. The two layers are equal
where those gates are, or where there is no text. For a video of several scenes only the weights are equal: its scenes
and texts are interleaved.

``ttt-lm`` (arXiv:2407.04620): the same inner loop inside another layer. Its projections have no biases, queries and
keys are not L2-normalized, the target is not normalized, and the layer replaces attention and has no gate: its weights
initialize ours, but do not give the same function. Its ``learnable_token_idx`` is our ``token_scale_offset``. Variants
with shared queries and keys or an output gate have further weights, which are refused.

Neither has our options for keys, values and updates. A block that has more weights because of them (``conv_kernel``,
``learned_momentum``) or fewer (``inner_norm: false``) is refused; with other options the weights initialize ours, but
do not give the same function.
"""

from __future__ import annotations

from collections.abc import Mapping

from moshi_ttt.core.block import SequenceBlock
from moshi_ttt.core.weight_map import WeightMap

SHARED = {
    "learnable_ttt_lr_bias": "lr_bias",
    "ttt_norm_weight": "norm_weight",
    "ttt_norm_bias": "norm_bias",
    "post_norm.weight": "post_norm.weight",
    "post_norm.bias": "post_norm.bias",
}


def _fast(layers: int) -> dict[str, str]:
    return {
        f"{letter}{i + 1}": f"{ours}.{i}"
        for i in range(layers)
        for letter, ours in (("W", "fast_weight"), ("b", "fast_bias"))
    }


class VideoDiT(WeightMap):
    """The layout of ttt-video-dit, for fast networks of ``layers`` layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def names(self, block: SequenceBlock) -> Mapping[str, str]:
        projections = {f"w{letter}.{part}": f"w{letter}.{part}" for letter in "qkvo" for part in ("weight", "bias")}
        gates = {"gating_alpha": "gate", "backward_gating_alpha": "gate_reversed"}
        learned = {name for name, _ in block.named_parameters()}
        rest = {theirs: ours for theirs, ours in gates.items() if ours in learned}
        return projections | SHARED | {"learnable_ttt_lr_weight": "lr_weight"} | rest | _fast(self.layers)

    def neutral(self, block: SequenceBlock) -> Mapping[str, float | None]:
        return {"token_scale_offset": 0.0} if block.causal else {}


class LanguageModel(WeightMap):
    """The layout of ttt-lm, for fast networks of ``layers`` layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def names(self, block: SequenceBlock) -> Mapping[str, str]:
        projections = {f"{letter}_proj.weight": f"w{letter}.weight" for letter in "qkvo"}
        rest = {"learnable_ttt_lr_weight": "lr_weight", "learnable_token_idx": "token_scale_offset"}
        if not block.causal:
            del rest["learnable_token_idx"]
        return projections | SHARED | rest | _fast(self.layers)

    def neutral(self, block: SequenceBlock) -> Mapping[str, float | None]:
        learned = {name for name, _ in block.named_parameters()}
        gates: dict[str, float | None] = dict.fromkeys({"gate", "gate_reversed"} & learned)
        return {**{f"w{letter}.bias": 0.0 for letter in "qkvo"}, **gates}
