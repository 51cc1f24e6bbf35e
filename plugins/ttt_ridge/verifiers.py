"""What ``moshi-ttt verify`` compares with reference vectors: the forms of ``ttt_ridge``'s memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moshi_ttt.core.format import ChunkLayout
from moshi_ttt.core.state import BlockState, clone
from moshi_ttt.core.verification import Kind, Shape, VectorSchema, Verifier
from moshi_ttt.plugins.ttt_ridge import compiled, memory
from moshi_ttt.plugins.ttt_ridge.backends import RidgeStep
from moshi_ttt.plugins.ttt_ridge.chunk import chunk_ridge
from moshi_ttt.plugins.ttt_ridge.naive import naive_ridge
from moshi_ttt.plugins.ttt_ridge.recurrent import recurrent_ridge

METADATA: Mapping[str, Kind] = {"chunk_size": "count", "keep": "number"}


class _Ridge(Verifier):
    operation = "ridge"

    def metadata(self) -> Mapping[str, Kind]:
        return METADATA

    def schema(self, metadata: Mapping[str, str], names: frozenset[str]) -> VectorSchema:
        keys, values = ("B", "T", "H", "m"), ("B", "T", "H", "d")
        inputs: dict[str, Shape] = {
            "q": keys, "k": keys, "v": values, "strength": ("B", "T", "H"), "regularization": ("H",)
        }  # fmt: skip
        if any("novelty" in name for name in names):  # without them, writes are weighted by their strengths alone
            inputs |= {"novelty_offset": ("H",), "novelty_slope": ("H",)}
        outputs: dict[str, Shape] = {"y": values, "solution": ("B", "H", "m", "d")}
        return VectorSchema(metadata=METADATA, inputs=inputs, outputs=outputs, sizes={})

    def accepts(self, metadata: Mapping[str, str]) -> bool:
        return float(metadata["keep"]) <= 1

    def tolerance(self, metadata: Mapping[str, str]) -> float:
        return 1e-9


def _novelty(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    return (inputs["novelty_offset"], inputs["novelty_slope"]) if "novelty_offset" in inputs else None


def _rule(inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> memory.Rule:
    return memory.Rule(inputs["regularization"], float(metadata["keep"]), _novelty(inputs))


def _start(inputs: Mapping[str, Tensor], rule: memory.Rule) -> BlockState:
    batch, _, heads, key = inputs["k"].shape
    return memory.initial_state(
        batch, heads, key, inputs["v"].shape[-1], inputs["k"], decays=rule.keep != 1, variance=False
    )


def _tokens(inputs: Mapping[str, Tensor], start: int = 0, stop: int | None = None) -> memory.RidgeTokens:
    q, k, v, strength = (inputs[name][:, start:stop] for name in ("q", "k", "v", "strength"))
    return memory.RidgeTokens(q, k, v, strength, torch.ones(q.shape[:2], dtype=torch.bool, device=q.device))


class RidgeNaive(_Ridge):
    """Sums over all tokens and one solution for each chunk, from the definition."""

    backend = "naive"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        y, _, solution = naive_ridge(
            *(inputs[name] for name in ("q", "k", "v", "strength", "regularization")),
            chunk_size=int(metadata["chunk_size"]), keep=float(metadata["keep"]), novelty=_novelty(inputs),
        )  # fmt: skip
        return {"y": y, "solution": solution}


class RidgeChunk(_Ridge):
    """A system of equations for each chunk: what training runs."""

    backend = "torch"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        rule = _rule(inputs, metadata)
        layout = ChunkLayout(inputs["k"].shape[1], int(metadata["chunk_size"]))
        read, state = chunk_ridge(_tokens(inputs), _start(inputs, rule), rule, layout)
        return {"y": read.value, "solution": state["solution"]}


class RidgeRecurrent(_Ridge):
    """Token by token with a state updated in place: what streaming runs. No gradients."""

    differentiable = False
    backend = "torch"

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(recurrent_ridge, inputs, metadata)

    def by(self, step: RidgeStep, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        """The outputs by a form of the step."""
        rule, size = _rule(inputs, metadata), int(metadata["chunk_size"])
        state = clone(_start(inputs, rule))
        steps = [step(_tokens(inputs, t, t + 1), state, rule, size) for t in range(inputs["k"].shape[1])]
        return {"y": torch.cat([read.value for read in steps], dim=1), "solution": state["solution"]}


class RidgeCppStep(RidgeRecurrent):
    """Token by token in C++. No gradients. Raises BackendError where it cannot be built."""

    backend = "cpp"
    builds = True

    def run(self, inputs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        return self.by(compiled.load(self), inputs, metadata)


NAIVE, CHUNK, RECURRENT, CPP_STEP = RidgeNaive(), RidgeChunk(), RidgeRecurrent(), RidgeCppStep()
