"""The forms of ``gating_mlp`` that reference vectors are checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.verification import Verifier
from moshi_ttt.plugins.gating_mlp import ops, reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class _InPlace(Verifier):
    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return metadata.get("op") == "in_place" and metadata.get("activation") in ACTIVATIONS

    def tolerance(self, metadata: Mapping[str, str]) -> float:
        return 1e-9


def _hidden(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tensor:
    """``[B, T, h]``."""
    gate, up = (inputs["x"] @ inputs["linear_in"].T).chunk(2, dim=-1)
    hidden: Tensor = ACTIVATIONS[metadata["activation"]](gate) * up
    return hidden


class Reference(_InPlace):
    """Chunk by chunk from the definition, one stream after the other."""

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        hidden = _hidden(inputs, metadata)
        rate = torch.full(hidden.shape[1:2], float(metadata["learning_rate"]), dtype=hidden.dtype)
        rows = [
            reference.in_place(
                h, t, inputs["linear_out"], inputs["conv"][:, 0], inputs.get("proj"), rate,
                chunk_size=int(metadata["chunk_size"]),
                left=ops.left_padding(int(metadata["conv_kernel_size"]), "centered"),
            )[0]
            for h, t in zip(hidden, inputs["target"], strict=True)
        ]  # fmt: skip
        return {"y": torch.stack(rows)}


class Batched(_InPlace):
    """All streams at once, by one of the two forms in ``ops``."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        self.form = form

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        hidden, size = _hidden(inputs, metadata), int(metadata["chunk_size"])
        layout = ChunkLayout(hidden.shape[1], size)
        keys, target = layout.split(hidden), layout.split(inputs["target"])
        left = ops.left_padding(int(metadata["conv_kernel_size"]), "centered")
        values = float(metadata["learning_rate"]) * ops.filtered(target, inputs["conv"], left)
        if "proj" in inputs:
            values = values @ inputs["proj"]
        complete = (torch.arange(1, layout.num_chunks + 1) * size <= hidden.shape[1])[None]
        added = self.form(keys, values, None, complete, 0.0)
        return {"y": hidden @ inputs["linear_out"].T + layout.merge(added)}


class Streamed(_InPlace):
    """Token by token with the accumulated update carried in a state. No gradients."""

    differentiable = False

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        hidden, size = _hidden(inputs, metadata), int(metadata["chunk_size"])
        left = ops.left_padding(int(metadata["conv_kernel_size"]), "centered")
        rate, done = float(metadata["learning_rate"]), torch.ones(1, 1, dtype=torch.bool)
        delta: Any = None
        outputs = []
        for t in range(hidden.shape[1]):
            added = 0 if delta is None else hidden[:, t : t + 1] @ delta.mT
            outputs.append(hidden[:, t : t + 1] @ inputs["linear_out"].T + added)
            if (t + 1) % size == 0:
                keys = hidden[:, None, t + 1 - size : t + 1]
                values = rate * ops.filtered(inputs["target"][:, None, t + 1 - size : t + 1], inputs["conv"], left)
                values = values @ inputs["proj"] if "proj" in inputs else values
                delta = ops.final_delta(keys, values, delta, done, 0.0)
        return {"y": torch.cat(outputs, dim=1)}


REFERENCE = Reference()
GRAM = Batched(ops.gram)
RUNNING_SUM = Batched(ops.running_sum)
STREAMED = Streamed()
