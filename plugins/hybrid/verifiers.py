"""Verifiers of reference vectors (``moshi-ttt verify``): every form of the inner loop and of the hybrid layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from moshi_ttt.core.errors import BackendError
from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.state import BlockState, clone
from moshi_ttt.core.verification import Kind, Shape, VectorSchema, Verifier
from moshi_ttt.plugins.common.projection import Linear
from moshi_ttt.plugins.hybrid import inner_loop, layer
from moshi_ttt.plugins.hybrid.chunk import chunk_inner_loop
from moshi_ttt.plugins.hybrid.config import HybridConfig
from moshi_ttt.plugins.hybrid.naive import naive_inner_loop, naive_inputs, naive_output
from moshi_ttt.plugins.hybrid.objective import InnerNorm
from moshi_ttt.plugins.hybrid.recurrent import recurrent_inner_loop
from moshi_ttt.plugins.hybrid.triton import backend as kernels
from moshi_ttt.plugins.hybrid.triton import step, train

INNER_LOOP: Mapping[str, Kind] = {
    "chunk_size": "count", "layers": "count", "causal": "flag", "norm_eps": "number", "activation": "text",
}  # fmt: skip
HYBRID: Mapping[str, Kind] = {
    **INNER_LOOP, "num_heads": "count", "base_lr": "number", "rope_theta": "number", "target_eps": "number",
    "post_norm_eps": "number",
}  # fmt: skip


def _widths(layers: int) -> list[str]:
    """Names of the widths of a fast network: the head's at both ends, one for each hidden layer between them."""
    return ["D", *(f"hidden {i}" for i in range(1, layers)), "D"]


def fast_shapes(layers: int, batch: tuple[str, ...] = ()) -> dict[str, Shape]:
    """Of the fast network's weights and biases, by name; ``batch``: dimensions before the head's."""
    shapes: dict[str, Shape] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(_widths(layers))):
        shapes[f"weight.{i}"] = (*batch, "H", fan_in, fan_out)
        shapes[f"bias.{i}"] = (*batch, "H", 1, fan_out)
    return shapes


class FastNetworkVerifier(Verifier):
    """For fast networks of ``layers`` layers, or of ``at_least`` so many. Forms differ in how they compute the same."""

    backend = "torch"

    def __init__(self, *, layers: int | None = None, at_least: int = 1) -> None:
        self.layers = layers
        self.at_least = at_least

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        given = int(metadata["layers"])
        fits = given >= self.at_least and self.layers in (None, given)
        return fits and metadata["activation"] == "gelu_tanh"

    def tolerance(self, metadata: Mapping[str, str]) -> float:
        return 1e-9


class _InnerLoopVerifier(FastNetworkVerifier):
    operation = "inner_loop"

    def metadata(self) -> Mapping[str, Kind]:
        return INNER_LOOP

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        layers, tokens = int(metadata["layers"]), ("B", "H", "T", "D")
        inputs: dict[str, Shape] = {
            **dict.fromkeys("qkv", tokens), "lr": ("B", "H", "T"), "token_scale": ("C",), "norm_weight": ("H", "D"),
            "norm_bias": ("H", "D"), **fast_shapes(layers),
        }  # fmt: skip
        return VectorSchema(
            metadata=INNER_LOOP, inputs=inputs, outputs={"y": tokens, **fast_shapes(layers, ("B",))},
            sizes={"C": int(metadata["chunk_size"])},
        )  # fmt: skip


class _HybridVerifier(FastNetworkVerifier):
    operation = "hybrid"

    def metadata(self) -> Mapping[str, Kind]:
        return HYBRID

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        layers, tokens = int(metadata["layers"]), ("B", "H", "T", "D")
        linears: dict[str, Shape] = {}
        for name in ("wq", "wk", "wv", "wo"):
            linears |= {f"{name}.weight": ("H*D", "H*D"), f"{name}.bias": ("H*D",)}
        inputs: dict[str, Shape] = {
            "norm_weight": ("H", "D"), "norm_bias": ("H", "D"), "x": ("B", "T", "H*D"), **linears,
            "lr_weight": ("H", 1, "H*D"), "lr_bias": ("H", 1),
            "post_norm.weight": ("H*D",), "post_norm.bias": ("H*D",), "token_scale": ("C",),
            "alpha": ("H*D",), **fast_shapes(layers),
        }  # fmt: skip
        return VectorSchema(
            metadata=HYBRID, inputs=inputs, outputs={"y": ("B", "T", "H*D"), **dict.fromkeys("qkv", tokens)},
            sizes={"C": int(metadata["chunk_size"]), "H": int(metadata["num_heads"])},
            without_gradient=frozenset({"token_scale"}),
        )  # fmt: skip


def _fast(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    layers = range(int(metadata["layers"]))
    return tuple(inputs[f"weight.{i}"] for i in layers), tuple(inputs[f"bias.{i}"] for i in layers)


def _final(state: BlockState) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(("weight.", "bias."))}


class InnerLoopNaive(_InnerLoopVerifier):
    """The inner loop, token by token from the definition."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        weights, biases = _fast(inputs, metadata)
        y, weights_after, biases_after = naive_inner_loop(
            inputs["q"], inputs["k"], inputs["v"], inputs["lr"], inputs["token_scale"], inputs["norm_weight"],
            inputs["norm_bias"], weights, biases, chunk_size=int(metadata["chunk_size"]),
            eps=float(metadata["norm_eps"]), causal=metadata["causal"] == "true",
        )  # fmt: skip
        after = {f"weight.{i}": w for i, w in enumerate(weights_after)}
        return {"y": y, **after, **{f"bias.{i}": b for i, b in enumerate(biases_after)}}


def _tokens(inputs: Mapping[str, Tensor], start: int = 0, stop: int | None = None) -> inner_loop.Tokens:
    """Tokens start to stop of the vectors' ``[B, H, T, ...]``."""
    return inner_loop.Tokens(*(inputs[name][:, :, start:stop].transpose(1, 2) for name in ("q", "k", "v", "lr")))


def _norm(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> InnerNorm:
    return InnerNorm(inputs["norm_weight"], inputs["norm_bias"], float(metadata["norm_eps"]))


def _per_head(y: Tensor, heads: int) -> Tensor:
    """``[B, T, H * D] -> [B, H, T, D]``."""
    return y.view(*y.shape[:2], heads, -1).transpose(1, 2)


class InnerLoopChunk(_InnerLoopVerifier):
    """The inner loop in its dual form: what training runs."""

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(chunk_inner_loop, inputs, metadata)

    def by(
        self,
        run: Callable[..., tuple[Tensor, BlockState]],
        inputs: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> dict[str, Tensor]:
        """The outputs, by a function like ``chunk_inner_loop``."""
        batch, heads, length, _ = inputs["q"].shape
        size = int(metadata["chunk_size"])
        y, state = run(
            _tokens(inputs),
            inner_loop.initial_state(*_fast(inputs, metadata), size, batch),
            _norm(inputs, metadata),
            inputs["token_scale"],
            layout=ChunkLayout(length, size),
            causal=metadata["causal"] == "true",
        )
        return {"y": _per_head(y, heads), **_final(state)}


class InnerLoopTriton(InnerLoopChunk):
    """The inner loop by Triton kernels, in Triton's interpreter. Outside of it, no file is accepted."""

    backend = "triton"
    dtypes = (torch.float32,)

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return super().accepts(metadata) and kernels.interpreted() and int(metadata["chunk_size"]) in kernels.CHUNKS

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """Raises BackendError for widths that the kernels do not take."""
        width, size = inputs["q"].shape[-1], int(metadata["chunk_size"])
        weights, _ = _fast(inputs, metadata)
        widths = (width, *(weight.shape[-1] for weight in weights))
        reason = kernels.not_here(inputs["q"].device) or kernels.not_these_shapes(widths, size)
        if reason is not None:
            raise BackendError(f"The Triton kernels cannot compute this file: {reason}. Choose another file.")
        products = kernels.products_of(inputs["q"].device, "highest")
        return self.by(train.load(inputs["q"].device, products), inputs, metadata)


class InnerLoopRecurrent(_InnerLoopVerifier):
    """The inner loop token by token with a state updated in place: what streaming runs. No gradients, causal only."""

    differentiable = False

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return super().accepts(metadata) and metadata["causal"] == "true"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(recurrent_inner_loop, inputs, metadata)

    def by(
        self, run: Callable[..., Tensor], inputs: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """The outputs, by a function like ``recurrent_inner_loop``."""
        batch, heads, length, _ = inputs["q"].shape
        norm = _norm(inputs, metadata)
        state = clone(inner_loop.initial_state(*_fast(inputs, metadata), int(metadata["chunk_size"]), batch))
        outputs = [run(_tokens(inputs, t, t + 1), state, norm, inputs["token_scale"]) for t in range(length)]
        return {"y": _per_head(torch.cat(outputs, dim=1), heads), **_final(state)}


class InnerLoopTritonStep(InnerLoopRecurrent):
    """The inner loop token by token by Triton kernels, in Triton's interpreter. Outside of it, no file is accepted."""

    backend = "triton"
    dtypes = (torch.float32,)

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return super().accepts(metadata) and kernels.interpreted()

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """Raises BackendError for sizes that the kernels do not take."""
        weights, _ = _fast(inputs, metadata)
        widths = (inputs["q"].shape[-1], *(weight.shape[-1] for weight in weights))
        device = inputs["q"].device
        reason = kernels.not_here(device) or step.not_these_shapes(widths, int(metadata["chunk_size"]))
        if reason is not None:
            raise BackendError(f"The Triton kernels cannot compute this file: {reason}. Choose another file.")
        return self.by(step.load(device), inputs, metadata)


class HybridNaive(_HybridVerifier):
    """The hybrid layer from its definition."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        given = dict(inputs)
        size = int(metadata["chunk_size"])
        q, k, v, lr = naive_inputs(
            given["x"], given, num_heads=int(metadata["num_heads"]), chunk_size=size,
            base_lr=float(metadata["base_lr"]), theta=float(metadata["rope_theta"]),
            target_eps=float(metadata["target_eps"]),
        )  # fmt: skip
        weights, biases = _fast(inputs, metadata)
        y, _, _ = naive_inner_loop(
            q, k, v, lr, given["token_scale"], given["norm_weight"], given["norm_bias"], weights, biases,
            chunk_size=size, eps=float(metadata["norm_eps"]), causal=metadata["causal"] == "true",
        )  # fmt: skip
        return {
            "y": naive_output(given["x"], y, given, eps=float(metadata["post_norm_eps"])),
            "q": q, "k": k, "v": v,
        }  # fmt: skip


class HybridChunk(_HybridVerifier):
    """The hybrid layer by the functions that the block consists of."""

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(chunk_inner_loop, inputs, metadata)

    def by(
        self,
        run: Callable[..., tuple[Tensor, BlockState]],
        inputs: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> dict[str, Tensor]:
        """The outputs, with the inner loop by a function like ``chunk_inner_loop``."""
        x = inputs["x"]
        batch, length, _ = x.shape
        size = int(metadata["chunk_size"])
        given = _layer(inputs, metadata)
        position = torch.arange(length, device=x.device)[None] % size  # [1, T]
        tokens = layer.inner_inputs(x, position, given)
        y, _ = run(
            tokens,
            inner_loop.initial_state(*_fast(inputs, metadata), size, batch),
            layer.objective(given),
            given.token_scale,
            layout=ChunkLayout(length, size),
            causal=metadata["causal"] == "true",
        )
        # [B, T, H, D] -> [B, H, T, D]
        result = {name: part.transpose(1, 2) for name, part in zip("qkv", tokens[:3], strict=True)}
        return {"y": layer.gated_output(x, y, given), **result}


def _layer(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> layer.HybridLayer:
    def linear(name: str) -> Linear:
        return Linear(inputs[f"{name}.weight"], inputs[f"{name}.bias"])

    config = HybridConfig(
        variant="hybrid",
        chunk=int(metadata["chunk_size"]),
        base_lr=float(metadata["base_lr"]),
        causal=metadata["causal"] == "true",
        rope_theta=float(metadata["rope_theta"]),
        norm_eps=float(metadata["norm_eps"]),
        target_eps=float(metadata["target_eps"]),
        post_norm_eps=float(metadata["post_norm_eps"]),
    )
    return layer.HybridLayer(
        config=config,
        roles=FP32_STATE.roles(inputs["x"].dtype),
        wq=linear("wq"),
        wk=linear("wk"),
        wv=linear("wv"),
        wo=linear("wo"),
        lr_weight=inputs["lr_weight"],
        lr_bias=inputs["lr_bias"],
        norm_weight=inputs["norm_weight"],
        norm_bias=inputs["norm_bias"],
        post_norm=linear("post_norm"),
        token_scale=inputs["token_scale"],
        gate=inputs["alpha"],
    )
