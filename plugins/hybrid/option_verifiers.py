"""The hybrid layers with their options, as verifiers of reference vectors: definition, one call, stream.

The call and the stream are the block's own, so that what it makes of its options is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.verification import Kind, Shape, VectorSchema
from moshi_ttt.plugins.common.backends import BackendName
from moshi_ttt.plugins.hybrid.block import HybridBlock
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop, naive_inputs, naive_output
from moshi_ttt.plugins.hybrid.verifiers import FastNetworkVerifier, fast_shapes

METADATA: Mapping[str, Kind] = {
    "chunk_size": "count", "layers": "count", "causal": "flag", "num_heads": "count", "base_lr": "number",
    "value": ("hidden", "embedding"), "inner_norm": "flag", "inner_steps": "count", "activation": "text",
}  # fmt: skip
Make = Callable[[Mapping[str, Any], list[int]], tuple[type[HybridBlock], HybridConfig]]
"""A variant's block and config, of the options that all variants have and the fast network's widths, but the last."""
EPS, THETA = {"norm_eps": 1e-6, "target_eps": 1e-8, "post_norm_eps": 1e-6}, 10_000.0
"""What every file has: the options' defaults."""


class _HybridOptions(FastNetworkVerifier):
    operation = "hybrid_options"
    computed: ClassVar[str] = ""
    """The operation of the block that ``backend`` computes, ``train`` or ``step``."""

    def __init__(self, make: Make, *, layers: int | None = None, at_least: int = 1) -> None:
        super().__init__(layers=layers, at_least=at_least)
        self.make = make

    def metadata(self) -> Mapping[str, Kind]:
        return METADATA

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        layers, width = int(metadata["layers"]), "H*D"
        inputs: dict[str, Shape] = {"x": ("B", "T", width), "lr_weight": ("H", 1, width), "lr_bias": ("H", 1)}
        if metadata["value"] == "embedding":
            inputs["embeddings"] = ("B", "T", width)
        for name in ("wq", "wk", "wv", "wo"):
            inputs |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
        if any(name.endswith("_taps") for name in names):  # without them, there is no convolution
            inputs |= {"query_taps": (width, "K"), "key_taps": (width, "K")}
        if metadata["inner_norm"] == "true":
            inputs |= {"norm_weight": ("H", "D"), "norm_bias": ("H", "D")}
        if any("momentum" in name for name in names):  # without it, there is none
            inputs["momentum_logit"] = ("H",)
        if metadata["causal"] == "true":
            inputs["token_scale_offset"] = ("C",)
        inputs |= {"post_norm.weight": (width,), "post_norm.bias": (width,), "alpha": (width,), **fast_shapes(layers)}
        return VectorSchema(
            metadata=METADATA, inputs=inputs, outputs={"y": ("B", "T", width), **fast_shapes(layers, ("B",))},
            sizes={"C": int(metadata["chunk_size"]), "H": int(metadata["num_heads"])},
        )  # fmt: skip

    def block(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> HybridBlock:
        """The block that the file describes, its parameters not yet set."""
        x = inputs["x"]
        options = {
            "chunk": int(metadata["chunk_size"]), "causal": metadata["causal"] == "true",
            "base_lr": float(metadata["base_lr"]), "value": metadata["value"],
            "inner_norm": metadata["inner_norm"] == "true", "inner_steps": int(metadata["inner_steps"]),
            "conv_kernel": inputs["key_taps"].shape[1] if "key_taps" in inputs else None,
            "learned_momentum": "momentum_logit" in inputs,
        }  # fmt: skip
        block, config = self.make(options, [inputs[f"weight.{i}"].shape[1] for i in range(int(metadata["layers"]))])
        info = SiteInfo(
            site=Site(0, SiteKind.SEQUENCE), dim=x.shape[-1], num_heads=int(metadata["num_heads"]), device=x.device,
            dtype=x.dtype, format=SequenceFormat(),
        )  # fmt: skip
        made = block(config, info, FP32_STATE.roles(x.dtype))
        if self.computed:
            made.use_backend(self.computed, cast(BackendName, self.backend))
        return made


def _parameters(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the block's names."""
    renamed = {"alpha": "gate"}
    return {
        f"fast_{name}" if name.startswith(("weight.", "bias.")) else renamed.get(name, name): tensor
        for name, tensor in inputs.items()
        if name not in ("x", "embeddings")
    }


def _final(y: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": y, **{name: tensor for name, tensor in state.items() if name.startswith(("weight.", "bias."))}}


class OptionsNaive(_HybridOptions):
    """The layer from its definition."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        given, size, causal = dict(inputs), int(metadata["chunk_size"]), metadata["causal"] == "true"
        x, eps = given["x"], EPS
        q, k, v, lr = naive_inputs(
            x, given, num_heads=int(metadata["num_heads"]), chunk_size=size, base_lr=float(metadata["base_lr"]),
            theta=THETA, target_eps=eps["target_eps"], embeddings=given.get("embeddings"),
        )  # fmt: skip
        layers = range(int(metadata["layers"]))
        scale = torch.full((size,), 1 / size, dtype=x.dtype)
        if causal:
            position = torch.arange(1, size + 1, dtype=x.dtype)
            scale = (1 / position + given["token_scale_offset"]).clamp(min=0)
        momentum = None
        if "momentum_logit" in given:
            momentum = torch.sigmoid(given["momentum_logit"])[:, None, None]  # [H] -> [H, 1, 1]
        norm = metadata["inner_norm"] == "true"
        nothing = x.new_zeros(0)
        y, weights, biases = naive_inner_loop(
            q, k, v, lr, scale, given.get("norm_weight", nothing), given.get("norm_bias", nothing),
            [given[f"weight.{i}"] for i in layers], [given[f"bias.{i}"] for i in layers], chunk_size=size,
            eps=eps["norm_eps"], causal=causal, steps=int(metadata["inner_steps"]), momentum=momentum, norm=norm,
        )  # fmt: skip
        after = {f"weight.{i}": w for i, w in enumerate(weights)} | {f"bias.{i}": b for i, b in enumerate(biases)}
        return _final(naive_output(x, y, given, eps=eps["post_norm_eps"]), after)


class OptionsChunk(_HybridOptions):
    """All tokens in one call of the block: what training runs."""

    computed = "train"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        context = BlockContext(input_embeddings=inputs.get("embeddings"))
        y, state = torch.func.functional_call(
            self.block(inputs, metadata), _parameters(inputs), (inputs["x"], None, context)
        )
        return _final(y, state)


class OptionsRecurrent(_HybridOptions):
    """Token by token with a state updated in place: what streaming runs. No gradients, causal only."""

    computed = "step"
    differentiable = False

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return super().accepts(metadata) and metadata["causal"] == "true"

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        x, block = inputs["x"], self.block(inputs, metadata)
        block.load_state_dict(_parameters(inputs))
        state = block.allocate_state(x.shape[0])
        steps = []
        for t in range(x.shape[1]):
            context = BlockContext(input_embeddings=inputs.get("embeddings", x)[:, t : t + 1])
            steps.append(block.step(x[:, t : t + 1], state, context))
        return _final(torch.cat(steps, dim=1), state)
