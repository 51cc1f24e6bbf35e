"""The forms of ``gating_mlp`` with its options that reference vectors are checked against: definition, call, stream.

The call and the stream are the block's own, so that what it makes of its options is compared too. A call takes one of
its two forms by ``prefers_parallel``; the shipped vectors have both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moshi_ttt.core.block import BlockContext, Site, SiteInfo, SiteKind
from moshi_ttt.core.format import SequenceFormat
from moshi_ttt.core.precision import FP32_STATE
from moshi_ttt.core.verification import Kind, VectorSchema
from moshi_ttt.plugins.common.backends import BackendName
from moshi_ttt.plugins.common.success_gate import TAPS
from moshi_ttt.plugins.gating_mlp import naive, ops
from moshi_ttt.plugins.gating_mlp.block import GatingMLP
from moshi_ttt.plugins.gating_mlp.config import GatingMLPConfig
from moshi_ttt.plugins.gating_mlp.verifiers import ACTIVATIONS, OPERANDS, TOKENS, InPlaceVerifier

METADATA: Mapping[str, Kind] = {
    "chunk_size": "count", "update": ("hebbian", "gradient", "ridge"), "keys": ("raw", "unit"), "target_norm": "flag",
    "learning_rate": "number", "keep": "number", "read_scale": "number", "conv_kernel_size": "count",
    "activation": "text",
}  # fmt: skip
PARAMETERS = {
    "conv": "conv", "proj": "projection", "lr_weight": "lr_weight", "lr_bias": "lr_bias", "log_ridge": "log_ridge",
    "success_bias": "success.bias", "success_slope": "success.slope", "success_weights": "success.weights",
}  # fmt: skip
"""Name in the file -> the block's parameter."""


class _InPlaceOptions(InPlaceVerifier):
    operation = "in_place_options"

    def metadata(self) -> Mapping[str, Kind]:
        return METADATA

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        inputs = {**OPERANDS, "proj": ("d", "d")}
        if metadata["update"] == "ridge":
            inputs["log_ridge"] = (1,)
        if any(name.endswith((".lr_weight", ".lr_bias")) for name in names):  # without them, every rate is the same
            inputs |= {"lr_weight": ("d",), "lr_bias": (1,)}
        if any(".success_" in name for name in names):  # without them, there is no gate
            inputs |= {"success_bias": (1,), "success_slope": (1,), "success_weights": (1, TAPS)}
        return VectorSchema(
            metadata=METADATA, inputs=inputs, outputs={"y": TOKENS, "update": ("B", "d", "h")},
            sizes={"K": int(metadata["conv_kernel_size"])},
        )  # fmt: skip

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return super().accepts(metadata) and float(metadata["keep"]) <= 1


class Naive(_InPlaceOptions):
    """Chunk by chunk from the definition, one stream after the other."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        rows = [self._row(inputs, metadata, row) for row in range(inputs["x"].shape[0])]
        y, update = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return {"y": y, "update": update}

    def _row(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str], row: int) -> tuple[Tensor, Tensor]:
        x, target = inputs["x"][row], inputs["target"][row]
        gate, up = (x @ inputs["linear_in"].T).chunk(2, dim=-1)
        hidden = ACTIVATIONS[metadata["activation"]](gate) * up
        keys = hidden / (hidden**2).sum(-1, keepdim=True).sqrt() if metadata["keys"] == "unit" else hidden
        if metadata["target_norm"] == "true":
            target = target / (target**2).mean(-1, keepdim=True).sqrt()
        rate = torch.full(x.shape[:1], float(metadata["learning_rate"]), dtype=x.dtype)
        if "lr_weight" in inputs:
            most = 2 if metadata["update"] == "hebbian" else 1
            rate = most * rate * torch.sigmoid(x @ inputs["lr_weight"] + inputs["lr_bias"])
        answers, fast = naive.naive_in_place(
            keys, target, torch.zeros_like(inputs["linear_out"]), inputs["conv"][:, 0], None, rate,
            chunk_size=int(metadata["chunk_size"]),
            left=ops.left_padding(int(metadata["conv_kernel_size"]), "centered"), decay=1 - float(metadata["keep"]),
            update=metadata["update"], ridge=inputs["log_ridge"].exp() if "log_ridge" in inputs else 0.0,
        )  # fmt: skip
        heard = answers * _gates(answers, target, inputs)[:, None] if "success_bias" in inputs else answers
        scale, projection = float(metadata["read_scale"]), inputs["proj"]
        return hidden @ inputs["linear_out"].T + scale * heard @ projection, scale * projection.T @ fast


def _gates(answers: Tensor, target: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """``[T]``, of ``answers`` and ``target [T, d]``, from the definition of the success gate."""
    gates: list[Tensor] = []
    scores = [answers.new_zeros(())] * TAPS
    for t in range(answers.shape[0]):
        score = answers.new_zeros(())
        if t and bool(answers[t - 1].any()):
            score = answers[t - 1] @ target[t] / ((answers[t - 1] ** 2).sum() * (target[t] ** 2).sum()).sqrt()
        scores = [score, *scores[:-1]]
        total = (inputs["success_weights"][0] * torch.stack(scores)).sum()
        gates.append(torch.sigmoid(inputs["success_bias"][0] + inputs["success_slope"][0] * total))
    return torch.stack(gates)


class _MLP(nn.Module):
    """A host's gated MLP, of the vectors' weights."""

    def __init__(self, inputs: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        width, hidden = inputs["linear_out"].shape
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False, dtype=inputs["x"].dtype)
        self.linear_out = nn.Linear(hidden, width, bias=False, dtype=inputs["x"].dtype)
        self.activation = ACTIVATIONS[activation]


class _Layer(nn.Module):
    """A block at its host's MLP; parameters by one ``functional_call``."""

    def __init__(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__()
        x = inputs["x"]
        self.mlp = _MLP(inputs, metadata["activation"])
        config = GatingMLPConfig.model_validate({
            "chunk": int(metadata["chunk_size"]), "update": metadata["update"], "keys": metadata["keys"],
            "target_norm": metadata["target_norm"] == "true", "lr": float(metadata["learning_rate"]),
            "learned_lr": "lr_weight" in inputs, "decay": 1 - float(metadata["keep"]),
            "read_scale": float(metadata["read_scale"]), "conv_kernel": int(metadata["conv_kernel_size"]),
            "success_gate": "success_bias" in inputs,
        })  # fmt: skip
        info = SiteInfo(
            site=Site(0, SiteKind.FEED_FORWARD), dim=x.shape[-1], num_heads=1, device=x.device, dtype=x.dtype,
            format=SequenceFormat(), mlp=self.mlp,
        )  # fmt: skip
        self.block = GatingMLP(config, info, FP32_STATE.roles(x.dtype))
        self.given = {f"block.{block}": inputs[name] for name, block in PARAMETERS.items() if name in inputs}
        self.given |= {f"mlp.{name}.weight": inputs[name] for name in ("linear_in", "linear_out")}

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        y, state = self.block(x, None, BlockContext(input_embeddings=target))
        return {"y": y, "update": self.block.accumulated_update(state)}


class Chunk(_InPlaceOptions):
    """All tokens in one call of the block: what training runs."""

    backend = "torch"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        layer = _Layer(inputs, metadata)
        found: dict[str, Tensor] = torch.func.functional_call(layer, layer.given, (inputs["x"], inputs["target"]))
        return found


class Recurrent(_InPlaceOptions):
    """Token by token with a state updated in place: what streaming runs. No gradients."""

    differentiable = False
    backend = "torch"
    step: BackendName = "torch"
    """What computes the block's step."""

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        layer = _Layer(inputs, metadata)
        layer.load_state_dict(layer.given)
        layer.block.use_backend("step", self.step)
        state = layer.block.allocate_state(inputs["x"].shape[0])
        steps = [
            layer.block.step(x, state, BlockContext(input_embeddings=target))
            for x, target in zip(inputs["x"].split(1, 1), inputs["target"].split(1, 1), strict=True)
        ]
        return {"y": torch.cat(steps, dim=1), "update": layer.block.accumulated_update(state)}


class CppStep(Recurrent):
    """Token by token in C++. No gradients. Raises BackendError where it cannot be built."""

    backend = "cpp"
    builds = True
    step = "cpp"


OPTIONS_NAIVE, OPTIONS_CHUNK, OPTIONS_RECURRENT, OPTIONS_CPP_STEP = Naive(), Chunk(), Recurrent(), CppStep()
