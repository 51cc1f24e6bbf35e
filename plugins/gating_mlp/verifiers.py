"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``gating_mlp``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.verification import Kind, Shape, VectorSchema, Verifier
from moshi_ttt.plugins.gating_mlp import compiled, ops
from moshi_ttt.plugins.gating_mlp.backends import MakesStepper
from moshi_ttt.plugins.gating_mlp.chunkwise import chunkwise_in_place
from moshi_ttt.plugins.gating_mlp.memory import Memory
from moshi_ttt.plugins.gating_mlp.naive import naive_in_place
from moshi_ttt.plugins.gating_mlp.parallel import parallel_in_place
from moshi_ttt.plugins.gating_mlp.recurrent import Stepper

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


METADATA: Mapping[str, Kind] = {
    "chunk_size": "count", "learning_rate": "number", "conv_kernel_size": "count", "activation": "text",
}  # fmt: skip


TOKENS: Shape = ("B", "T", "d")
OPERANDS: Mapping[str, Shape] = {
    "x": TOKENS, "target": TOKENS, "linear_out": ("d", "h"), "linear_in": ("2*h", "d"), "conv": ("d", 1, "K"),
}  # fmt: skip
"""Inputs of every file, with options or without."""


class InPlaceVerifier(Verifier):
    """A form of ``gating_mlp``, with a gated MLP of a known activation."""

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return metadata["activation"] in ACTIVATIONS

    def tolerance(self, metadata: Mapping[str, str]) -> float:
        return 1e-9


class _InPlace(InPlaceVerifier):
    operation = "in_place"

    def metadata(self) -> Mapping[str, Kind]:
        return METADATA

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        inputs = dict(OPERANDS)
        if names & {"in.proj", "grad.proj"}:  # without either, the projection is the identity
            inputs["proj"] = ("d", "d")
        return VectorSchema(
            metadata=METADATA, inputs=inputs, outputs={"y": TOKENS}, sizes={"K": int(metadata["conv_kernel_size"])}
        )


def _hidden(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tensor:
    """``[B, T, h]``."""
    gate, up = (inputs["x"] @ inputs["linear_in"].T).chunk(2, dim=-1)
    hidden: Tensor = ACTIVATIONS[metadata["activation"]](gate) * up
    return hidden


class InPlaceNaive(_InPlace):
    """Chunk by chunk from the definition, one stream after the other."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        hidden = _hidden(inputs, metadata)
        rate = torch.full(hidden.shape[1:2], float(metadata["learning_rate"]), dtype=hidden.dtype)
        rows = [
            naive_in_place(
                h, t, inputs["linear_out"], inputs["conv"][:, 0], inputs.get("proj"), rate,
                chunk_size=int(metadata["chunk_size"]),
                left=ops.left_padding(int(metadata["conv_kernel_size"]), "centered"),
            )[0]
            for h, t in zip(hidden, inputs["target"], strict=True)
        ]  # fmt: skip
        return {"y": torch.stack(rows)}


class InPlaceForm(_InPlace):
    """All streams at once, by one of the two forms of training."""

    backend = "torch"

    def __init__(self, form: Callable[..., Tensor]) -> None:
        self.form = form

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        hidden, size = _hidden(inputs, metadata), int(metadata["chunk_size"])
        layout = ChunkLayout(hidden.shape[1], size)
        left = ops.left_padding(int(metadata["conv_kernel_size"]), "centered")
        values = float(metadata["learning_rate"]) * ops.filtered(layout.split(inputs["target"]), inputs["conv"], left)
        complete = (torch.arange(1, layout.num_chunks + 1) * size <= hidden.shape[1])[None]
        applied = torch.ones(hidden.shape[0], layout.num_chunks, dtype=torch.bool)
        added = self.form(hidden, layout.merge(values), None, complete, applied, 0.0, size)
        return {"y": hidden @ inputs["linear_out"].T + added @ _projection(inputs)}


class InPlaceRecurrent(_InPlace):
    """Token by token, as streaming runs. No gradients."""

    differentiable = False
    backend = "torch"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(Stepper, inputs, metadata)

    @torch.no_grad()
    def by(self, make: MakesStepper, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """The outputs by a form of the step."""
        hidden, target = _hidden(inputs, metadata), inputs["target"]
        memory = Memory.planned(
            chunk=int(metadata["chunk_size"]), hidden=hidden.shape[-1], width=target.shape[-1],
            kernel=int(metadata["conv_kernel_size"]), padding="centered",
        )  # fmt: skip
        state = memory.initial(hidden.shape[0], hidden.dtype, hidden.device)
        stepper = make(memory, state["delta"])
        rate = hidden.new_full((hidden.shape[0], 1, 1), float(metadata["learning_rate"]))
        added = [
            stepper.step(state, (h, t, rate), inputs["conv"], _projection(inputs), None)
            for h, t in zip(hidden.split(1, 1), target.split(1, 1), strict=True)
        ]
        return {"y": hidden @ inputs["linear_out"].T + torch.cat(added, dim=1)}


class InPlaceCppStep(InPlaceRecurrent):
    """Token by token in C++. No gradients. Raises BackendError where it cannot be built."""

    backend = "cpp"
    builds = True

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(compiled.load(self), inputs, metadata)


def _projection(inputs: Mapping[str, Tensor]) -> Tensor:
    found = inputs.get("proj")
    return torch.eye(inputs["target"].shape[-1]).to(inputs["target"]) if found is None else found


NAIVE = InPlaceNaive()
PARALLEL = InPlaceForm(parallel_in_place)
CHUNKWISE = InPlaceForm(chunkwise_in_place)
RECURRENT = InPlaceRecurrent()
CPP_STEP = InPlaceCppStep()
