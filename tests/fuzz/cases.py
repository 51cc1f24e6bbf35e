"""What the fuzz draws, as plain values: a layer, a configuration to compare, a program for streams.

Each prints as the Python that makes it, so that a failing one can be run again by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import SequenceBlock, Site, SiteInfo, SiteKind
from moshi_ttt.core.config import BlockConfig
from moshi_ttt.core.config_parsing import parse_block
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.registry import default_registry
from tests.fuzz import ridge
from tests.fuzz.definition import Hybrid, HybridOptions, HybridStream, InPlace, InPlaceOptions, InPlaceStream

Definition = Hybrid | InPlace | ridge.Ridge
Stream = HybridStream | InPlaceStream | ridge.RidgeStream

HYBRID_DEFAULTS: dict[str, Any] = {
    "chunk": 32, "causal": True, "bidirectional": False, "rope_theta": 10_000.0,
    "norm_eps": 1e-6, "target_eps": 1e-8, "post_norm_eps": 1e-6, "conv_kernel": None, "value": "hidden",
    "inner_norm": True, "inner_steps": 1, "momentum": None,
}  # fmt: skip
BASE_LR = {"ttt_linear": 1.0, "ttt_mlp": 0.1, "ttt_multilayer": 0.1}
IN_PLACE_DEFAULTS: dict[str, Any] = {
    "chunk": 256, "update": "hebbian", "lr": 0.3, "learned_lr": False, "keys": "raw", "target": "input_embed",
    "target_norm": False, "conv_kernel": 5, "padding": "centered", "start": "published", "read_scale": 1.0,
    "success_gate": False, "decay": 0.0, "clip": None, "train_w_down": False,
}  # fmt: skip
"""As documented, written down again: a default that changed would show."""


class HostMLP(nn.Module):
    """The gated MLP that a host hands to a feed-forward block."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False, dtype=dtype)
        self.linear_out = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.activation = nn.functional.silu


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block, with random parameters.

    Attributes:
        options: its entry in a configuration file, the variant included.
        width: D; heads: H, of a hybrid variant; hidden: h, of gating_mlp's host.
        spread: standard deviation of the fast weights' and the projections' outputs.
        seed: of the parameters.
    """

    options: dict[str, Any]
    width: int
    heads: int = 1
    hidden: int = 3
    spread: float = 1.0
    seed: int = 0

    @property
    def in_place(self) -> bool:
        return self.options["variant"] == "gating_mlp"

    @property
    def ridge(self) -> bool:
        return self.options["variant"] == "ttt_ridge"

    @property
    def option(self) -> dict[str, Any]:
        """Every option, defaults included."""
        if self.in_place:
            return {**IN_PLACE_DEFAULTS, **self.options}
        if self.ridge:
            return {**ridge.DEFAULTS, **self.options}
        defaults = {**HYBRID_DEFAULTS, "base_lr": BASE_LR[self.options["variant"]]}
        if self.options.get("bidirectional"):
            defaults["causal"] = False
        return {**defaults, **self.options}

    @property
    def causal(self) -> bool:
        return self.in_place or self.ridge or self.option["causal"]

    @property
    def fast_widths(self) -> list[int]:
        """Of the fast network of a hybrid variant, its input and output included."""
        head, variant = self.width // self.heads, self.options["variant"]
        if variant == "ttt_linear":
            return [head, head]
        if self.options.get("hidden_dims") is not None:
            return [head, *self.options["hidden_dims"], head]
        depth = 2 if variant == "ttt_mlp" else self.options.get("depth", 3)
        return [head, *[self.options.get("expansion", 4) * head] * (depth - 1), head]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the block's own parameters, by name."""
        if self.ridge:
            return self._ridge_shapes()
        return self._in_place_shapes() if self.in_place else self._hybrid_shapes()

    @property
    def memories(self) -> int:
        """Heads of ttt_ridge: one for each 128 channels where the option is left out."""
        return self.option["heads"] or max(1, self.width // 128)

    def _ridge_shapes(self) -> dict[str, tuple[int, ...]]:
        option, width, heads = self.option, self.width, self.memories
        keys, values = (heads * (option[name] or width // heads) for name in ("key_width", "value_width"))
        shapes: dict[str, tuple[int, ...]] = {
            "wqk.weight": (keys, width), "wqk.bias": (keys,), "value_weight": (values, width),
            "write.weight": (heads, width), "write.bias": (heads,), "log_regularization": (heads,),
            "wo.weight": (width, values), "wo.bias": (width,),
        }  # fmt: skip
        shapes |= dict.fromkeys(("conv_q", "conv_k"), (keys, option["conv_kernel"]))
        for name, there in (("success", "success_gate"), ("novelty", "novelty"), ("variance", "variance_gate")):
            if option[there]:
                shapes |= dict.fromkeys((f"{name}_offset", f"{name}_slope"), (heads,))
        if option["success_gate"]:
            shapes["success_taps"] = (heads, 4)
        alpha = option.get("gate", {}).get("alpha", "channel")
        if alpha != "fixed":
            shapes["gate"] = (width,) if alpha == "channel" else (1,)
        return shapes

    def _in_place_shapes(self) -> dict[str, tuple[int, ...]]:
        option, width = self.option, self.width
        shapes: dict[str, tuple[int, ...]] = {"conv": (width, 1, option["conv_kernel"]), "projection": (width, width)}
        if option["learned_lr"]:
            shapes |= {"lr_weight": (width,), "lr_bias": (1,)}
        if option["update"] == "ridge":
            shapes["log_ridge"] = (1,)
        if option["success_gate"]:
            shapes |= {"success.bias": (1,), "success.slope": (1,), "success.weights": (1, 4)}
        if option["train_w_down"]:
            shapes["w_down_change"] = (width, self.hidden)
        return shapes

    def _hybrid_shapes(self) -> dict[str, tuple[int, ...]]:
        option, width, heads, head = self.option, self.width, self.heads, self.width // self.heads
        shapes: dict[str, tuple[int, ...]] = {
            "lr_weight": (heads, 1, width), "lr_bias": (heads, 1), "post_norm.weight": (width,),
            "post_norm.bias": (width,),
        }  # fmt: skip
        if option["inner_norm"]:
            shapes |= {"norm_weight": (heads, head), "norm_bias": (heads, head)}
        if option["conv_kernel"] is not None:
            shapes |= dict.fromkeys(("query_taps", "key_taps"), (width, option["conv_kernel"]))
        if option.get("learned_momentum"):
            shapes["momentum_logit"] = (heads,)
        for name in ("wq", "wk", "wv", "wo"):
            shapes |= {f"{name}.weight": (width, width), f"{name}.bias": (width,)}
        for i, (before, after) in enumerate(pairwise(self.fast_widths)):
            shapes |= {f"fast_weight.{i}": (heads, before, after), f"fast_bias.{i}": (heads, 1, after)}
        if option["causal"]:
            shapes["token_scale_offset"] = (option["chunk"],)
        alpha = option.get("gate", {}).get("alpha", "channel")
        if alpha != "fixed":
            shapes |= dict.fromkeys(self._gates(), (width,) if alpha == "channel" else (1,))
        return shapes

    def _gates(self) -> list[str]:
        return ["gate", "gate_reversed"] if self.option["bidirectional"] else ["gate"]

    def parameters(self) -> dict[str, Tensor]:
        """Random values of the block's own parameters, float64."""
        generator = torch.Generator().manual_seed(self.seed)
        values = {}
        for name, shape in sorted(self.shapes().items()):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in ("norm_weight", "post_norm.weight"):
                values[name] = 1 + 0.3 * noise
            elif name.startswith("fast_weight."):
                values[name] = self.spread * noise / math.sqrt(shape[-2])
            elif name.endswith("weight") or name in ("projection", "w_down_change"):
                values[name] = self.spread * noise / math.sqrt(shape[-1])
            elif name in ("gate", "gate_reversed", "conv", "conv_q", "conv_k", "query_taps", "key_taps"):
                values[name] = noise
            else:  # biases, and token_scale_offset: 1 / (n + 1) + 0.5 noise is often below zero
                values[name] = 0.5 * noise
        return values

    def host_parameters(self) -> dict[str, Tensor]:
        """Random values of the host's gated MLP; empty for a hybrid variant."""
        if not self.in_place:
            return {}
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = {"linear_in": (2 * self.hidden, self.width), "linear_out": (self.width, self.hidden)}
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[1])
            for name, shape in shapes.items()
        }

    def definition(self, parameters: Mapping[str, Tensor], *, keep_graph: bool = True) -> Definition:
        """The oracle with these values, the host's included."""
        option = self.option
        if self.in_place:
            names = (
                "chunk", "update", "lr", "keys", "target", "target_norm", "padding", "read_scale", "success_gate",
                "decay", "clip",
            )  # fmt: skip
            return InPlace(InPlaceOptions(**{name: option[name] for name in names}), parameters)
        if self.ridge:
            return self._ridge_definition(parameters)
        options = HybridOptions(heads=self.heads, **{n: option[n] for n in (*HYBRID_DEFAULTS, "base_lr")})
        gate = option.get("gate", {})
        if gate.get("alpha") == "fixed":
            fixed = torch.tensor([gate.get("init", 0.05)], dtype=torch.float64)
            parameters = {**parameters, **dict.fromkeys(self._gates(), fixed)}
        return Hybrid(options, parameters, keep_graph=keep_graph)

    def _ridge_definition(self, parameters: Mapping[str, Tensor]) -> ridge.Ridge:
        option = self.option
        names = ("chunk", "features", "value", "decay", "readout_scale")
        options = ridge.RidgeOptions(heads=self.memories, **{name: option[name] for name in names})
        gate = option.get("gate", {})
        if gate.get("alpha") == "fixed":
            parameters = {**parameters, "gate": torch.tensor([gate.get("init", 0.05)], dtype=torch.float64)}
        return ridge.Ridge(options, parameters)

    def stream(self, definition: Definition) -> Stream:
        if isinstance(definition, ridge.Ridge):
            return ridge.RidgeStream(definition)
        return InPlaceStream(definition) if isinstance(definition, InPlace) else HybridStream(definition)

    def config(self) -> BlockConfig:
        return parse_block(self.options, registry=default_registry())

    def block(self, dtype: torch.dtype = torch.float64) -> SequenceBlock:
        """The package's block with the same values. Parameters of other names or shapes are a failure."""
        registry, config, mlp = default_registry(), self.config(), None
        kind = SiteKind.FEED_FORWARD if self.in_place else SiteKind.SEQUENCE
        if self.in_place:
            mlp = HostMLP(self.width, self.hidden, dtype)
            with torch.no_grad():
                mlp.linear_in.weight.copy_(self.host_parameters()["linear_in"])
                mlp.linear_out.weight.copy_(self.host_parameters()["linear_out"])
        info = SiteInfo(
            site=Site(0, kind), dim=self.width, num_heads=self.heads, device=torch.device("cpu"), dtype=dtype,
            format=SequenceFormat(), mlp=mlp,
        )  # fmt: skip
        block = registry.block(config.variant).factory(config, info, FP32_STATE.roles(dtype))
        block.reset_parameters(torch.Generator().manual_seed(0))
        load(block, self.parameters())
        return block


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """``[1]`` for a number without dimensions too: which of the two holds a single number is not said anywhere."""
    return tuple(tensor.shape) or (1,)


def load(block: SequenceBlock, values: Mapping[str, Tensor]) -> None:
    """Give a block these parameters. Raises AssertionError where it has others."""
    own = dict(block.named_parameters())
    has, wanted = ({n: shape_of(t) for n, t in tensors.items()} for tensors in (own, values))
    assert has == wanted, f"the block's parameters are {has}, and by its documentation they would be {wanted}"
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name].reshape(parameter.shape))


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A layer, and what it is compared on in one call.

    Attributes:
        learns: of each row, whether its updates are on; its length is the batch.
        changed: the token that is changed to see what depends on it.
        alternating: None for random tokens. Otherwise all x are equal and the input embeddings change sign from token
            to token, but for noise of this size: a chunk's update is then a difference of large sums.
        seed: of the inputs.
    """

    layer: Layer
    learns: tuple[bool, ...]
    length: int
    changed: int
    alternating: float | None = None
    seed: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """x and the input embeddings ``[B, T, D]``, the cotangent of the output, and other tokens to change to."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.learns), self.length, self.layer.width)
        names = ("x", "embeddings", "cotangent", "other_x", "other_embeddings")
        inputs = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in names}
        if self.alternating is not None:
            inputs |= alternated(inputs["x"], inputs["embeddings"], self.alternating)
        return inputs


def alternated(x: Tensor, embeddings: Tensor, noise: float) -> dict[str, Tensor]:
    """``[B, T, D]`` of equal tokens and embeddings of alternating sign, but for noise."""
    sign = 1 - 2 * (torch.arange(x.shape[1]) % 2)[:, None].double()  # [T, 1]
    return {"x": x[:, :1] + noise * x, "embeddings": sign * embeddings[:, :1] + noise * embeddings}


@dataclass(frozen=True, kw_only=True)
class Spoiled:
    """A layer that hears one token that is not finite, or huge, in one row.

    Attributes:
        value: of the whole token, as ``float`` reads it.
        row, token: which; steps: whether it comes in steps of one token or in one call.
        seed: of the other tokens.
    """

    layer: Layer
    value: str
    batch: int
    length: int
    row: int
    token: int
    steps: bool
    dtype: str = "float64"
    seed: int = 0


@dataclass(frozen=True)
class Call:
    """The next ``tokens`` tokens of every row, in place (``step``) or not (``forward``).

    Rows that do not run keep their state; ``None`` leaves an argument out.
    """

    tokens: int
    runs: tuple[bool, ...] | None = None
    resets: tuple[bool, ...] | None = None
    learns: tuple[bool, ...] | bool = True
    in_place: bool = True


@dataclass(frozen=True)
class Reset:
    """``reset_state`` for some rows, between calls."""

    rows: tuple[bool, ...]


@dataclass(frozen=True)
class Reload:
    """Save the state to safetensors and go on in another block, from what was read."""


@dataclass(frozen=True)
class CompileStep:
    """Go on by the compiled step, where the variant has one."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A program for the rows of one causal block; ``alternating`` tokens as in ``Configuration``."""

    layer: Layer
    batch: int
    events: tuple[Call | Reset | Reload | CompileStep, ...]
    dtype: str = "float64"
    alternating: float | None = None
    seed: int = 0

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return {"float64": torch.float64, "float32": torch.float32}[self.dtype]


@dataclass(frozen=True)
class HostCall:
    """The next ``tokens`` tokens of every row through a whole model, with ``host.updates``."""

    tokens: int
    learns: tuple[bool, ...] | bool = True


@dataclass(frozen=True)
class NewCarry:
    """End the context in which the model carries state, and begin another that goes on from it."""


@dataclass(frozen=True, kw_only=True)
class HostSchedule:
    """A program for the rows of a toy model.

    Attributes:
        blocks: for each layer of the model, the block at its sequence site and the one at its feed-forward site. All
            have the model's width and heads, and its hidden width, which is twice its width.
    """

    blocks: tuple[tuple[Layer | None, Layer | None], ...]
    width: int
    heads: int
    batch: int
    events: tuple[HostCall | Reset | NewCarry, ...]
    seed: int = 0
